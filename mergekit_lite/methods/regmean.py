"""RegMean: the linear layer whose outputs are closest to those of each model's own, on each model's own inputs.

Jin, Ren, Preotiuc-Pietro and Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", 2023,
https://arxiv.org/abs/2212.09849 (equations 1 and 2). In the paper's convention, x W, with W [in, out],

    minimize  sum_i |X_i W - X_i W_i|²   by   W = (sum_i G_i)^-1 sum_i G_i W_i,   G_i = X_iᵀ X_i

and what stands off the diagonals of the G_i is scaled by alpha first. torch's weights are [out, in], the transposed
ones, and G_i is symmetric: W = (sum_i W_i G_i) (sum_i G_i)^-1.

Here a G_i is the mean of x xᵀ over the tokens of model i and not their sum, so that no text counts for more by its
length; w_i tells what counts for how much, as factor of G_i. What is solved for is the way from the weighted mean M of
the W_i, with the same damping of every G_i:

    W = M + (sum_i w_i (W_i - M) G_i') (sum_i w_i G_i' + d I)^-1,   G_i' = alpha G_i + (1 - alpha) diag(G_i)

So a direction in which no input went stays at the mean, models that are equal give themselves to the bit, and for
alpha = 1 the sum that is minimized is never above that of the mean, whatever d: W minimizes it plus
d sum_i w_i |W - W_i|², of which M has the least second part.

RegMean++ (https://arxiv.org/abs/2508.03121) is the same with other inputs: `regmean_walk` gathers them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wtool.statistics import Factor, factor

from ..arithmetic import chunks

ALPHA = 0.9  # the paper's for all but T5, which it gives 0.1
DAMPING = 1e-4
ROWS = 1024  # of a matrix at a time: rows do not know of each other


@dataclass(frozen=True)
class Merged:
    """A matrix that was made of several."""

    weight: Tensor  # [out, in]
    objective: float | None  # sum_i w_i mean |(W - W_i) x|² as a share of what it is at the mean; None without inputs
    damping: float | None  # what was added to the diagonal, as a share of its mean; None where it is the plain mean
    fallback: str | None = None  # why it is the plain mean


@dataclass(frozen=True)
class _System:
    """What is to be solved for all matrices that share an input."""

    grams: Sequence[Tensor | None]
    total: Tensor  # sum_i w_i G_i, [in, in]
    scale: float  # mean of its diagonal, where that is not 0
    factor: Factor  # of (sum_i w_i G_i' / scale), damped


def regmean(
    models: Sequence[Tensor],
    grams: Sequence[Tensor | None],
    *,
    weight: Sequence[float],
    alpha: float = ALPHA,
    damping: float = DAMPING,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Merge matrices of one shape.

    models:  [out, in] each, of any float types
    grams:   [in, in] each, the mean of x xᵀ over the model's tokens; None where the matrix saw no token
    weight:  one a model, 0 or more, not all 0
    alpha:   factor of what is not on the diagonals, in [0, 1]; 0 is the mean weighted by the inputs' squares
    damping: share of the diagonal's mean to add to the diagonal, at least 0; more is tried where it is not enough
    dtype:   of the result; that of the models if None

    raises: RuntimeProblem where a Gram matrix has a value that is not finite
    """
    return regmean_shared([models], grams, weight=weight, alpha=alpha, damping=damping, dtype=dtype)[0]


def regmean_shared(
    linears: Sequence[Sequence[Tensor]],
    grams: Sequence[Tensor | None],
    *,
    weight: Sequence[float],
    alpha: float = ALPHA,
    damping: float = DAMPING,
    dtype: torch.dtype | None = None,
) -> list[Merged]:
    """Merge several linears that share an input, by one factorization.

    linears: [linear][model], [out, in] each
    Other arguments as of `regmean`. Memory beside the results: three matrices [in, in] and six of ROWS rows.
    """
    shares = [each / sum(weight) for each in weight]
    kind = chunks.working_type([tensor for models in linears for tensor in models])
    grams = [None if gram is None or share == 0 else gram.to(kind) for gram, share in zip(grams, shares, strict=True)]
    system = _system(grams, shares, alpha, damping)
    if isinstance(system, str):
        return [_mean_of_all(models, shares, kind, dtype, system) for models in linears]
    return [_solved(models, shares, system, alpha, kind, dtype) for models in linears]


def _system(grams: Sequence[Tensor | None], shares: Sequence[float], alpha: float, damping: float) -> _System | str:
    """What is to be solved, or why nothing is."""
    known = [(gram, share) for gram, share in zip(grams, shares, strict=True) if gram is not None]
    if not known:
        return "no token came to it in any model"
    total = known[0][0] * known[0][1]
    for gram, share in known[1:]:
        total.add_(gram, alpha=share)
    diagonal = total.diagonal()
    scale = float(diagonal[diagonal > 0].mean(dtype=torch.float64)) if bool((diagonal > 0).any()) else 0.0
    if scale == 0:
        return "its inputs were all 0"
    shrunk = total * (alpha / scale)
    shrunk.diagonal().copy_(diagonal / scale)
    found = factor(shrunk, damping=damping)
    if found is None:
        return "its Gram matrix is not positive definite, however damped"
    return _System(grams, total, scale, found)


def _solved(
    models: Sequence[Tensor],
    shares: Sequence[float],
    system: _System,
    alpha: float,
    kind: torch.dtype,
    dtype: torch.dtype | None,
) -> Merged:
    """One matrix, a stripe of rows after the other."""
    result = torch.empty(models[0].shape, dtype=chunks.result_type(models, dtype), device=system.total.device)
    before = after = 0.0
    for begin in range(0, len(result), ROWS):
        rows = [model[begin : begin + ROWS].to(result.device, kind) for model in models]
        mean = _mean(rows, shares)
        pull, target = torch.zeros_like(mean), torch.zeros_like(mean)
        for own, gram, share in zip(rows, system.grams, shares, strict=True):
            if gram is not None:
                away = own - mean
                product = away @ gram
                before += share * _dot(product, away)
                pull.add_(product, alpha=share)
                target.add_(away.mul_(gram.diagonal()), alpha=share * (1 - alpha))
        change = _divided(target.add_(pull, alpha=alpha).div_(system.scale), system.factor)
        after += _dot((change @ system.total).sub_(pull, alpha=2), change)
        result[begin : begin + ROWS] = mean.add_(change)
    objective = max(0.0, before + after) / before if before > 0 else 1.0
    return Merged(result, objective, system.factor.damping)


def _divided(matrix: Tensor, found: Factor) -> Tensor:
    """matrix · (A diag(pivots) Aᵀ)^-1."""
    solve = torch.linalg.solve_triangular
    half = solve(found.upper.t(), matrix, upper=False, left=False, unitriangular=True).div_(found.pivots)
    return solve(found.upper, half, upper=True, left=False, unitriangular=True)


def _mean_of_all(
    models: Sequence[Tensor], shares: Sequence[float], kind: torch.dtype, dtype: torch.dtype | None, why: str
) -> Merged:
    result = torch.empty(models[0].shape, dtype=chunks.result_type(models, dtype))
    for begin in range(0, len(result), ROWS):
        result[begin : begin + ROWS] = _mean([model[begin : begin + ROWS].to(kind) for model in models], shares)
    return Merged(result, None, None, why)


def _mean(models: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean, from the first on: of equal models it is they themselves, without rounding."""
    mean = models[0].clone()
    for model, share in zip(models[1:], shares[1:], strict=True):
        mean.add_(model - models[0], alpha=share)
    return mean


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
