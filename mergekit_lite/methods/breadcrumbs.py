"""Model breadcrumbs: of every task vector drop the smallest elements, as noise, and the largest, as outliers.

Davari and Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", 2024,
https://arxiv.org/abs/2312.06795 (equations 1 to 3). With the elements of a task vector ordered by magnitude, the share
gamma of the largest and as many of the smallest are masked that the share `density` stays:

    out = theta_0 + lambda sum_i w_i m_i (theta_i - theta_0)

The names are mergekit's (its gamma is the paper's beta); the order is over each tensor, as there.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic import selection
from ..arithmetic.task_vectors import NOTHING, WHOLE, Thin, merge_task_vectors, rescaled
from .ties import kept


@InPieces
def breadcrumbs(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Mask both ends, sum.

    weight:    one a model
    density:   share of each task vector's elements to keep, in [0, 1], one a model; it keeps one element at least
        unless it is 0 (mergekit keeps none of a single element)
    gamma:     share of the largest to drop, in [0, 1], one a model; where it leaves too few to keep, fewer are dropped
    normalize: divide the sum by the weights' sum
    rescale:   bring each masked task vector back to its l1 norm before
    lambda_:   factor of the merged task vector
    """
    thin = [_mask(base, *each, rescale) for each in zip(models, density, gamma, strict=True)]
    return merge_task_vectors(
        base, models, thin=thin, weight=weight, elect=False, normalize=normalize, scale=lambda_, dtype=dtype
    )


@InPieces
def breadcrumbs_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Mask both ends, elect signs as TIES does, sum what agrees; parameters as for `breadcrumbs`.

    normalize: divide each element by the sum of the weights that agree with the elected sign
    """
    thin = [_mask(base, *each, rescale) for each in zip(models, density, gamma, strict=True)]
    return merge_task_vectors(
        base, models, thin=thin, weight=weight, elect=True, normalize=normalize, scale=lambda_, dtype=dtype
    )


def _mask(base: Tensor, model: Tensor, density: float, gamma: float, rescale: bool) -> Thin:
    """From the largest magnitude on (of equal ones, the earlier first), skip the outliers and keep what follows."""
    elements = model.numel()
    keep = kept(density, elements)
    if keep >= elements:
        return WHOLE
    if not keep:
        return NOTHING
    outliers = min(int(Fraction(str(gamma)) * elements), elements - keep)
    to_last, to_outlier = selection.tops(selection.Magnitudes([base, model]), keep=[outliers + keep, outliers])
    thin = Thin(kept=to_last, dropped=to_outlier)
    return rescaled(thin, base, model) if rescale else thin
