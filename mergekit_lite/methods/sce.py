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

from ..arithmetic import chunks, selection


def sce(
    base: Tensor, models: Sequence[Tensor], *, select_topk: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Select, calculate, erase, merge.

    select_topk: share to keep of the elements in which the models differ at all, in [0, 1]; 1 keeps all elements.
        A model alone has no variance: less than 1 leaves the base
    """
    cut = _select(models, select_topk)
    shares = _shares(base, models, cut)
    one = torch.ones((), dtype=chunks.working_type([base, *models]))

    def merge(begin: int, parts: list[Tensor], spare: list[Tensor]) -> Tensor:
        original, changes = _changes(begin, parts, len(models), cut)
        total, count, aside = spare
        total.zero_()
        for part in changes:
            total.add_(part)
        sign = torch.copysign(one, total, out=total)
        count.zero_()
        for part, share in zip(changes, shares, strict=True):
            part.mul_(sign).clamp_min_(0.0)  # what agrees is positive
            count.add_(torch.sign(part, out=aside), alpha=share)
        out = changes[0].mul_(shares[0])
        for part, share in zip(changes[1:], shares[1:], strict=True):
            out.add_(part, alpha=share)
        out.div_(count.add_(torch.eq(count, 0.0, out=aside)))
        return original.addcmul_(out, sign)

    kind = chunks.result_type([base, *models], dtype)
    return chunks.apply(merge, _tensors(base, models, cut), spare=3, dtype=kind)


def _select(models: Sequence[Tensor], share: float) -> selection.Cut | None:
    """The elements of largest variance; None for all."""
    if share >= 1.0:
        return None
    variances = selection.Magnitudes(_variance, models)
    differing = sum(int(np.count_nonzero(piece)) for _, piece in variances.pieces())
    return selection.top(variances, keep=int(Fraction(str(share)) * differing))


def _variance(parts: list[Tensor]) -> Tensor:
    """In place, and times the number of models. Taken of differences to the first: where all are equal, it is 0."""
    mean, *others = parts
    for part in others:
        part.sub_(mean)
    mean.zero_()
    for part in others:
        mean.add_(part, alpha=1.0 / len(parts))
    for part in others:
        part.sub_(mean).square_()
    total = mean.square_()
    for part in others:
        total.add_(part)
    return total


def _shares(base: Tensor, models: Sequence[Tensor], cut: selection.Cut | None) -> list[float]:
    """The weights of the models: shares of the sum of squares of what is selected."""
    squares = [0.0] * len(models)
    for begin, parts in chunks.pieces(_tensors(base, models, cut)):
        _, changes = _changes(begin, parts, len(models), cut)
        for i, part in enumerate(changes):
            squares[i] += float(np.square(part.numpy(), dtype=np.float64).sum())
    total = sum(squares)
    return [square / total if total else 1.0 / len(models) for square in squares]


def _tensors(base: Tensor, models: Sequence[Tensor], cut: selection.Cut | None) -> list[Tensor]:
    """What `_changes` needs: where there is a cut, the models a second time, for their variance."""
    return [base, *models, *(models if cut else [])]


def _changes(begin: int, parts: list[Tensor], count: int, cut: selection.Cut | None) -> tuple[Tensor, list[Tensor]]:
    """The base's piece, and the task vectors' with what is not selected set to 0."""
    original, changes = parts[0], parts[1 : count + 1]
    mask = cut.mask(begin, _variance(parts[count + 1 :])) if cut else None
    for part in changes:
        part.sub_(original)
        if mask is not None:
            part.mul_(mask)
    return original, changes
