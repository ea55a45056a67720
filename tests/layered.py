"""Checkpoints made by hand, of the families' names and tiny matrices: what a merge makes of them is told by loops."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER = ("input_layernorm.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight")


def names(depth: int, prefix: str = "model.") -> list[str]:
    """A llama's tensors, in short."""
    layers = [f"{prefix}layers.{number}.{rest}" for number in range(depth) for rest in LAYER]
    return [f"{prefix}embed_tokens.weight", *layers, f"{prefix}norm.weight", "lm_head.weight"]


def llama(folder: Path, depth: int, seed: int, **config: Any) -> dict[str, Tensor]:
    """Write such a checkpoint; returns its tensors."""
    told = {"model_type": "llama", "num_hidden_layers": depth, "vocab_size": 6, "tie_word_embeddings": False}
    return written(folder, names(depth), seed, {**told, **config})


def written(folder: Path, tensors: Iterable[str], seed: int, config: dict[str, Any]) -> dict[str, Tensor]:
    """Write random tensors of these names; returns them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (4,) if "norm" in name else (6, 4) for name in tensors}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in the order of its files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
