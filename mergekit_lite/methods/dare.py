"""DARE: drop elements of every task vector at random, scale up the rest, then sum, or elect signs as TIES does.

Yu et al., "Language models are Super Mario: absorbing abilities from homologous models as a free lunch", 2024,
https://arxiv.org/abs/2311.03099 (equations 1 to 3). With drop rate 1 - density:

    m ~ Bernoulli(density),    d <- m d / density

so that every element keeps its expectation. mergekit instead scales each thinned vector back to the l1 norm it
had before, which is not the same for heavy tails; that is `rescale="l1"`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces
from wtool.random_bits import RandomBits

from ..arithmetic.random_mask import LEVELS
from ..arithmetic.task_vectors import WHOLE, Thin, merge_task_vectors, rescaled

Rescale = Literal["density", "l1", "none"]


@InPieces
def dare_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    key: Sequence[int],
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Drop, rescale, sum.

    weight:    one a model
    density:   probability that an element is kept, in [0, 1], one a model
    key:       names each model's mask, see `random_mask.mask_key`
    rescale:   "density" (the paper: divide by it), "l1" (mergekit: back to the l1 norm before), or "none"
    normalize: divide the sum by the weights' sum
    lambda_:   factor of the merged task vector
    """
    thin = [_drop(base, *each, rescale) for each in zip(models, density, key, strict=True)]
    return merge_task_vectors(
        base, models, thin=thin, weight=weight, elect=False, normalize=normalize, scale=lambda_, dtype=dtype
    )


@InPieces
def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    key: Sequence[int],
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Drop, rescale, elect signs, sum what agrees; parameters as for `dare_linear`.

    normalize: divide each element by the sum of the weights that agree with the elected sign
    """
    thin = [_drop(base, *each, rescale) for each in zip(models, density, key, strict=True)]
    return merge_task_vectors(
        base, models, thin=thin, weight=weight, elect=True, normalize=normalize, scale=lambda_, dtype=dtype
    )


def _drop(base: Tensor, model: Tensor, density: float, key: int, rescale: Rescale) -> Thin:
    level = round(density * LEVELS)
    if level == LEVELS:
        return WHOLE
    thin = Thin(factors=RandomBits(key).take, level=level)
    if rescale == "l1":
        return rescaled(thin, base, model)
    return replace(thin, times=LEVELS / level) if rescale == "density" and level else thin
