"""Width: which channels, heads and key-value heads to keep, by what they add to the outputs of the matrices they feed.

The ranking is Minitron's in kind (Muralidharan et al., "Compact Language Models via Pruning and Knowledge
Distillation", 2024, https://arxiv.org/abs/2407.14679), by activations on calibration text, with the weights that read
them counted in: an input's energy is the mean of x_j² times |W[:, j]|² (`importance`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def highest(scores: Tensor, keep: int) -> tuple[int, ...]:
    """The numbers of the highest scores [n], in ascending order; of equal ones the first."""
    order = torch.argsort(-scores, stable=True)[:keep]
    return tuple(sorted(order.tolist()))


def heads(energy: Tensor, count: int, kv_heads: int, keep: int) -> tuple[int, ...]:
    """Query heads, as many of every key-value head.

    energy: [count * head_dim], of the inputs of the output projection
    keep:   a multiple of kv_heads
    """
    scores = energy.reshape(kv_heads, count // kv_heads, -1).sum(-1)
    size = count // kv_heads
    each = keep // kv_heads
    return tuple(group * size + number for group in range(kv_heads) for number in highest(scores[group], each))


def key_value_heads(energy: Tensor, kv_heads: int, keep: int) -> tuple[int, ...]:
    """Key-value heads, by the sum over their query heads."""
    return highest(energy.reshape(kv_heads, -1).sum(-1), keep)


def hidden(energies: Iterable[Tensor], keep: int) -> tuple[int, ...]:
    """Channels of the residual stream, by their share of the energy of each linear that reads it.

    energies: [hidden] each
    """
    total: Tensor | None = None
    for energy in energies:
        share = (energy / energy.sum().clamp(min=1e-30)).double()
        total = share if total is None else total + share
    assert total is not None, "a model has linears that read the residual stream"
    return highest(total, keep)


def norm_factor(spread: Tensor, kept: tuple[int, ...]) -> float:
    """What a norm's output is to be multiplied by when it sees fewer channels, so that these stay as long as they were.

    spread: [hidden], mean over tokens of x_i² / mean of x²
    """
    return float(spread[list(kept)].mean().clamp(min=0).sqrt())
