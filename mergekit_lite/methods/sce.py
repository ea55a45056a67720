"""SCE: select the elements in which models differ most, weigh models by how far they moved, erase minority signs.

Wan et al., "FuseChat: knowledge fusion of chat models", 2024, https://arxiv.org/abs/2408.07990 (section 3.3). With
task vectors d_i = theta_i - theta_0:

    1. select     d_i <- m d_i, with m the share `select_topk` of largest variance over the models
    2. calculate  a_i = mean(d_i^2) / sum_j mean(d_j^2)
    3. erase      s = sign(sum_i d_i); d_i <- 0 where it has another sign than s
    4. merge      out = theta_0 + sum_i a_i d_i / sum_i a_i [d_i has sign s]

mergekit takes equal weights where the mean squares sum to less than 1e-6, as those of many fine-tunings do; here only
task vectors of zeros have equal weights.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic import chunks, selection
from ..arithmetic.task_vectors import ALL


@InPieces
def sce(
    base: Tensor, models: Sequence[Tensor], *, select_topk: float = 1.0, dtype: torch.dtype | None = None
) -> Pieces:
    """Select, calculate, erase, merge.

    select_topk: share to keep of the elements in which the models differ at all, in [0, 1]; 1 keeps all elements.
        A model alone has no variance: less than 1 leaves the base
    """
    tensors = [base, *models]
    chosen = _select(models, select_topk)
    cut, work = chunks.of_working_type(tensors, chosen.magnitude)[()], chunks.work(tensors, len(models) + 4)
    squares, room = np.zeros(len(models)), np.empty(chunks.kernels().BLOCK)
    for begin, (original, *tuned) in chunks.spans(tensors):
        chunks.kernels().selected_squares(original, tuple(tuned), squares, work, room, cut, chosen.ties_end - begin)
    shares = chunks.of_working_type(tensors, squares / squares.sum() if squares.sum() else np.ones(len(models)))

    def merge(begin: int, parts: tuple[chunks.Array, ...], out: chunks.Array) -> None:
        original, *tuned = parts
        chunks.kernels().merge_selected(original, tuple(tuned), out, work, cut, chosen.ties_end - begin, shares)

    return chunks.apply(merge, tensors, dtype=dtype)


def _select(models: Sequence[Tensor], share: float) -> selection.Cut:
    """The elements of largest variance."""
    if share >= 1.0:
        return ALL
    spreads = selection.Magnitudes(models)
    differing = sum(int(np.count_nonzero(piece != 0)) for _, piece in spreads.pieces())
    return selection.top(spreads, keep=int(Fraction(str(share)) * differing))
