"""RAM: what one model alone changed is added in full, what several changed is averaged.

Yuan et al., "Behavior knowledge merge in reinforced agentic models", 2026, https://arxiv.org/abs/2601.13572. The task
vectors of reinforcement learning are sparse, and a mean over all models shrinks what only one of them learnt. With
m_i = |d_i| > epsilon and c = sum_i m_i, the number of models that changed an element:

    out = theta_0 + sum_i f_i m_i d_i / max(c, 1)

where f_i is 1 (ram), or for the elements that i alone changed (ramplus_tl) lambda_i = 1 + r min(rho_i, alpha), with
rho_i the ratio of shared to unique elements of model i, here of the tensor, as mergekit has it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic import chunks


@InPieces
def ram(base: Tensor, models: Sequence[Tensor], *, epsilon: float = 1e-5, dtype: torch.dtype | None = None) -> Pieces:
    """Add what is unique, average what is shared.

    epsilon: a change of no more than this is none, >= 0
    """
    return _merge(base, models, [0.0] * len(models), epsilon, dtype)


@InPieces
def ramplus_tl(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Add what is unique, scaled up by how much is shared, average what is shared.

    r:       how much a model's unique elements are scaled up for its ratio of shared to unique ones
    alpha:   where that ratio ends, >= 0
    epsilon: as for `ram`
    """
    boosts = [r * min(ratio, alpha) for ratio in _ratios(base, models, epsilon)]
    return _merge(base, models, boosts, epsilon, dtype)


def _merge(
    base: Tensor, models: Sequence[Tensor], boosts: Sequence[float], epsilon: float, dtype: torch.dtype | None
) -> Pieces:
    """boosts: lambda_i - 1"""
    tensors = [base, *models]
    times = chunks.of_working_type(tensors, [1.0 + boost for boost in boosts])
    least, work = chunks.of_working_type(tensors, epsilon)[()], chunks.work(tensors, len(models) + 3)

    def merge(_: int, parts: tuple[chunks.Array, ...], out: chunks.Array) -> None:
        original, *tuned = parts
        chunks.kernels().merge_unique(original, tuple(tuned), out, work, least, times)

    return chunks.apply(merge, tensors, dtype=dtype)


def _ratios(base: Tensor, models: Sequence[Tensor], epsilon: float) -> list[float]:
    """Of each model, the elements that others changed too for each that it changed alone; 0 where it has no such."""
    tensors = [base, *models]
    least, work = chunks.of_working_type(tensors, epsilon)[()], chunks.work(tensors, len(models) + 3)
    changed, unique = np.zeros((2, len(models)), dtype=np.int64)
    for _, (original, *tuned) in chunks.spans(tensors):
        chunks.kernels().count_unique(original, tuple(tuned), work, least, changed, unique)
    return [(each - own) / own if own else 0.0 for each, own in zip(changed.tolist(), unique.tolist(), strict=True)]
