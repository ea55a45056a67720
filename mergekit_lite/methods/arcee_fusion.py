"""Arcee Fusion: take from a model only the elements that changed much, in rows that changed their shape.

Arcee AI, in mergekit 0.1, 2025, https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration
With p and q the softmax of a row (along the last axis) of theta_1 and theta_0, each plus 1e-8, and Q1, Q2, Q3 the
quartiles of all the tensor's importances:

    importance = |theta_1 - theta_0| * sum_row p log(p / q)
    out        = theta_1 where importance >= Q2 + 1.5 (Q3 - Q1), else theta_0

Quartiles are the lower of two neighbours: the elements at places (n-1)/4, (n-1)/2, 3(n-1)/4, rounded down.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arithmetic import chunks
from ..arithmetic.gram import row_pieces
from ..arithmetic.quantiles import order_statistics

FLOOR = 1e-8  # added to each probability


def arcee_fusion(base: Tensor, models: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the base with the important elements of the one other model.

    Where no element is more important than another (tensors of one column, whose softmax is 1; models equal to the
    base), all are taken. Beyond pieces of whole rows this holds a number for each row, and for the quartiles the
    elements in three narrow ranges of importance.
    """
    (model,) = models
    if not base.numel():
        return model.to(chunks.result_type([base, model], dtype))
    rows = [tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in (base, model)]
    divergence = _divergence(rows)
    places = [quarter * (base.numel() - 1) // 4 for quarter in (1, 2, 3)]

    def importances() -> Iterator[NDArray[np.float32]]:
        for _, _, importance in _walk(rows, divergence):
            yield importance.reshape(-1).numpy()

    first, median, third = order_statistics(importances, places)
    threshold = median + 1.5 * (third - first)
    result = torch.empty(base.shape, dtype=chunks.result_type([base, model], dtype))
    out = result.view(rows[0].shape)
    for piece, (original, other), importance in _walk(rows, divergence):
        out[piece].copy_(torch.where(importance >= threshold, other, original))
    return result


def _walk(rows: Sequence[Tensor], divergence: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (which rows, base and model there [2, rows, length], their elements' importance in float32)."""
    for piece, pair in row_pieces(rows, chunks.working_type(rows)):
        importance = torch.sub(pair[1], pair[0]).mul_(divergence[piece, None])
        yield piece, pair, importance.abs_().float()


def _divergence(rows: Sequence[Tensor]) -> Tensor:
    """The Kullback-Leibler divergence of each row's softmax [rows], in the working type, computed in float64."""
    found = torch.empty(rows[0].shape[0], dtype=chunks.working_type(rows))
    for piece, pair in row_pieces(rows, torch.float64):
        powers = pair.sub_(pair.amax(dim=-1, keepdim=True)).exp_()
        q, p = powers.div_(powers.sum(dim=-1, keepdim=True)).add_(FLOOR)
        found[piece] = torch.linalg.vecdot(p, torch.div(p, q, out=q).log_()).clamp_min(0.0)
    return found
