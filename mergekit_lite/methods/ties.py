"""TIES: of every task vector keep the largest elements, elect a sign for each element, average what agrees with it.

Yadav et al., "TIES-Merging: resolving interference when merging models", 2023, https://arxiv.org/abs/2306.01708
(algorithm 1). Trimming is per tensor, as in all implementations for language models; the paper trims over the
whole model.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic import selection
from ..arithmetic.task_vectors import NOTHING, WHOLE, Thin, merge_task_vectors, rescaled


@InPieces
def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Trim, elect signs, merge.

    weight:    one a model
    density:   share of each task vector's elements to keep, in [0, 1], one a model
    normalize: divide each element by the sum of the weights that agree with the elected sign (the paper's mean)
    rescale:   bring each trimmed task vector back to its l1 norm before
    lambda_:   factor of the merged task vector
    """
    thin = [_trim(base, model, share, rescale) for model, share in zip(models, density, strict=True)]
    return merge_task_vectors(
        base, models, thin=thin, weight=weight, elect=True, normalize=normalize, scale=lambda_, dtype=dtype
    )


def kept(density: float, elements: int) -> int:
    """How many elements a density keeps: the whole part of the product, and one at least unless density is 0."""
    return max(1, int(Fraction(str(density)) * elements)) if density > 0 else 0


def _trim(base: Tensor, model: Tensor, density: float, rescale: bool) -> Thin:
    keep = kept(density, model.numel())
    if keep >= model.numel():
        return WHOLE
    if not keep:
        return NOTHING
    thin = Thin(kept=selection.top(selection.Magnitudes([base, model]), keep=keep))
    return rescaled(thin, base, model) if rescale else thin
