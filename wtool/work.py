"""How much a walk through a model computes and holds, told from headers: for plans, before anything is run."""

from collections.abc import Iterable, Mapping
from typing import Any

from wtool.checkpoint.base import Checkpoint
from wtool.layer_rules import text_config
from wtool.linear_names import LAYER, LinearLayer, linear_layers

FLOAT = 4  # bytes of the type that is computed in
HIDDEN = ("hidden_size", "n_embd", "d_model", "hidden_dim")  # how families name the width in config.json


def walk_work(source: Checkpoint, samples: int, seqlen: int, *, forwards: int, fits: bool) -> dict[str, Any]:
    """What a walk over calibration text takes.

    forwards: through each block
    fits:     whether matrices are changed column by column under their Gram matrices (GPTQ, SparseGPT)
    returns:  flops, and peak_memory_bytes above what is imported; both rough, and upper bounds where text is short
    """
    linears, _ = linear_layers(source)
    tokens = samples * seqlen
    blocks = list(_blocks(linears.values()).values())
    hidden = _hidden(source.config)
    weights = sum(rows * columns for block in blocks for rows, columns in block)
    forward = 2 * tokens * weights + 2 * tokens * seqlen * hidden * len(blocks)
    grams = sum(2 * tokens * columns**2 for block in blocks for columns in _inputs(block)) if fits else 0
    columns_loop = sum(2 * rows * columns**2 for block in blocks for rows, columns in block) if fits else 0
    largest = max((sum(rows * columns for rows, columns in block) for block in blocks), default=0)
    widest = max((sum(columns**2 for columns in _inputs(block)) for block in blocks), default=0) if fits else 0
    held = 2 * tokens * hidden + 2 * largest + 3 * widest
    return {"flops": forwards * forward + grams + columns_loop, "peak_memory_bytes": FLOAT * held}


def _blocks(linears: Iterable[LinearLayer]) -> Mapping[int, list[tuple[int, int]]]:
    """The shapes of each block's linear layers."""
    blocks: dict[int, list[tuple[int, int]]] = {}
    for linear in linears:
        match = LAYER.match(linear.tensor)
        blocks.setdefault(int(match[2]) if match else -1, []).append(linear.shape)
    return blocks


def _inputs(block: list[tuple[int, int]]) -> list[int]:
    """The widths of a block's inputs: q, k and v share one, gate and up another, so about half as many as layers."""
    widths = sorted(columns for _, columns in block)
    return widths[:: 2 if len(widths) > 1 else 1]


def _hidden(config: Mapping[str, Any]) -> int:
    text = text_config(config)
    return next((text[key] for key in HIDDEN if isinstance(text.get(key), int)), 0)
