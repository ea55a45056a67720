"""Arcee Fusion: take from a model only the elements that changed much, in rows that changed their shape.

Arcee AI, in mergekit 0.1, 2025, https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration
With p and q the softmax of a row (along the last axis) of theta_1 and theta_0, each plus 1e-8, and Q1, Q2, Q3 the
quartiles of all the tensor's importances:

    importance = |theta_1 - theta_0| * sum_row p log(p / q)
    out        = theta_1 where importance >= Q2 + 1.5 (Q3 - Q1), else theta_0

Quartiles are the lower of two neighbours: the elements at places (n-1)/4, (n-1)/2, 3(n-1)/4, rounded down. The 1.5 is
`iqr_factor`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wtool.pieces import InPieces, Pieces, pieces_of

from ..arithmetic import chunks
from ..arithmetic.selection import Magnitudes, order_statistics


@InPieces
def arcee_fusion(
    base: Tensor, models: Sequence[Tensor], *, iqr_factor: float = 1.5, dtype: torch.dtype | None = None
) -> Pieces:
    """Return the base with the important elements of the one other model.

    iqr_factor: how many interquartile ranges above the median an element's importance is at least, 0 or more; the
        larger, the fewer elements are taken

    Where no element is more important than another (tensors of one column, whose softmax is 1; models equal to the
    base), all are taken. Beyond pieces of whole rows this holds a number for each row, and for the quartiles the
    elements in three narrow ranges of importance.
    """
    (model,) = models
    if not base.numel():
        return pieces_of(model, chunks.result_type([base, model], dtype))
    rows = [tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in (base, model)]
    divergence = chunks.of_working_type(rows, _divergence(rows))
    importances = Magnitudes(rows, divergence)
    first, median, third = order_statistics(importances, [q * (base.numel() - 1) // 4 for q in (1, 2, 3)])
    threshold = chunks.of_working_type(rows, median + iqr_factor * (third - first))[()]
    work = chunks.work(rows, 2)

    def merge(begin: int, parts: tuple[chunks.Array, ...], out: chunks.Array) -> None:
        loop = chunks.kernels().merge_important
        loop(*parts, out, work, begin, rows[0].shape[1], divergence, threshold)

    return replace(chunks.apply(merge, rows, dtype=dtype), shape=base.shape)


def _divergence(rows: Sequence[Tensor]) -> NDArray[np.float64]:
    """The Kullback-Leibler divergence of each row's softmax [rows]."""
    count, columns = rows[0].shape
    found, room = np.empty(count), np.empty((4, columns))
    for begin, parts in chunks.spans(rows, columns):
        first = begin // columns
        some = found[first : first + parts[0].size // columns]
        chunks.kernels().divergences(*parts, columns, some, room)
    return found
