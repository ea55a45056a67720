"""RAM: what one model alone changed is added in full, what several changed is averaged.

Yuan et al., "Behavior knowledge merge in reinforced agentic models", 2026, https://arxiv.org/abs/2601.13572. The task
vectors of reinforcement learning are sparse, and a mean over all models shrinks what only one of them learnt. With
m_i = |d_i| > epsilon and c = sum_i m_i, the number of models that changed an element:

    out = theta_0 + sum_i f_i m_i d_i / max(c, 1)

where f_i is 1 (ram), or for the elements that i alone changed (ramplus_tl) lambda_i = 1 + r min(rho_i, alpha), with
rho_i the ratio of shared to unique elements of model i, here of the tensor, as mergekit has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arithmetic import chunks


def ram(base: Tensor, models: Sequence[Tensor], *, epsilon: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """Add what is unique, average what is shared.

    epsilon: a change of no more than this is none, >= 0
    """
    return _merge(base, models, [0.0] * len(models), epsilon, dtype)


def ramplus_tl(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add what is unique, scaled up by how much is shared, average what is shared.

    r:       how much a model's unique elements are scaled up for its ratio of shared to unique ones
    alpha:   where that ratio ends, >= 0
    epsilon: as for `ram`
    """
    boosts = [r * min(ratio, alpha) for ratio in _ratios(base, models, epsilon)]
    return _merge(base, models, boosts, epsilon, dtype)


def _merge(
    base: Tensor, models: Sequence[Tensor], boosts: Sequence[float], epsilon: float, dtype: torch.dtype | None
) -> Tensor:
    """boosts: lambda_i - 1"""

    def merge(_: int, parts: list[Tensor], spare: list[Tensor]) -> Tensor:
        original, *changes = parts
        count, aside, boosted = spare
        _count_changes(original, changes, count, aside, epsilon)
        if any(boosts):
            boosted.zero_()
            for part, boost in zip(changes, boosts, strict=True):
                boosted.add_(part, alpha=boost)
            boosted.mul_(torch.eq(count, 1.0, out=aside))
        out = changes[0]
        for part in changes[1:]:
            out.add_(part)
        out.div_(count.clamp_min_(1.0))
        return original.add_(out.add_(boosted) if any(boosts) else out)

    return chunks.apply(merge, [base, *models], spare=3, dtype=chunks.result_type([base, *models], dtype))


def _ratios(base: Tensor, models: Sequence[Tensor], epsilon: float) -> list[float]:
    """Of each model, the elements that others changed too for each that it changed alone; 0 where it has no such."""
    changed, unique = [0] * len(models), [0] * len(models)
    count, aside = torch.empty(2, chunks.CHUNK, dtype=chunks.working_type([base, *models]))
    for _, (original, *changes) in chunks.pieces([base, *models]):
        size = original.numel()
        _count_changes(original, changes, count[:size], aside[:size], epsilon)
        alone = torch.eq(count[:size], 1.0, out=aside[:size])
        for i, part in enumerate(changes):
            changed[i] += int(torch.count_nonzero(part))
            unique[i] += int(torch.count_nonzero(part.mul_(alone)))
    return [(each - own) / own if own else 0.0 for each, own in zip(changed, unique, strict=True)]


def _count_changes(original: Tensor, changes: Sequence[Tensor], count: Tensor, aside: Tensor, epsilon: float) -> None:
    """Turn models' pieces into task vectors without their smallest elements, and count what is left of each."""
    count.zero_()
    for part in changes:
        torch.hardshrink(part.sub_(original), epsilon, out=part)
        count.add_(torch.ne(part, 0.0, out=aside))
