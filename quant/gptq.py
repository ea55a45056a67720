"""GPTQ: round the columns of a weight one after the other, each making up for the errors of those before it.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, https://arxiv.org/abs/2210.17323 (algorithm 1). With G the Gram matrix of the inputs and E the
weights W minus their rounded values Q, it is a greedy search for small tr(E G Eᵀ), the squared error of the outputs.

It is computed in the form that Chee, Cai, Kuleshov and De Sa, "QuIP: 2-Bit Quantization of Large Language Models With
Guarantees", 2023, https://arxiv.org/abs/2307.13304 (theorem 6) prove to be the same. With G = A diag(pivots) Aᵀ, A unit
upper triangular,

    tr(E G Eᵀ) = Σ_j pivots[j] |E[:, j] + Σ_{i<j} E[:, i] A[i, j]|²   asks for
    Q[:, j] = round(W[:, j] + Σ_{i<j} E[:, i] A[i, j])

which needs one Cholesky factor and no inverse.

With `cross`, outputs are to be those that the linear gave with its inputs as they were before anything was quantized:
the asymmetric calibration of Li, Yin, Lee, Xiao and Panda, "GPTAQ", 2025, https://arxiv.org/abs/2504.02692. For new
inputs x and old ones x + d, completing the square in the mean of |Q x - W (x + d)|² gives

    tr((W' - Q) G (W' - Q)ᵀ) + what Q does not change,   W' = W + W D G⁻¹,   D the mean of d xᵀ,

so that GPTQ of W' is all there is to do. (The paper adds the term column by column, to the columns that are left, which
leaves more of the error: the tests compare the two.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wtool.grid import Clip, Grid, Quantized
from wtool.statistics import Factor, factor

from .refine import added, better_rows, refine_codes, refit_scales
from .rtn import rtn
from .stack import Fitting, Job, quantize


@dataclass(frozen=True)
class Outcome:
    """A quantized weight, and what was done to get it."""

    quantized: Quantized
    damping: float | None  # share of the diagonal's mean that was added to it; None where the weight was only rounded
    fallback: str | None  # why the weight was only rounded
    dead: int  # input features that were 0 at every token; their codes stand for 0, unless the weight was only rounded


@dataclass(frozen=True)
class Settings:
    """What can be chosen.

    scale_dtype:   the type that scales are stored in; all arithmetic is with the scales as stored
    damping:       share of the mean of G's diagonal to add to the diagonal; more is tried if need be
    act_order:     columns in the order of decreasing mean square of their inputs, not as they lie
    static_groups: scales of groups of neighbours, from the weights as they were; otherwise of groups of columns that
                   follow one another in the order, from the weights as the columns before the group have left them
    clip:          a search for the share of each group's range to cover
    refine:        how often to go over all codes again, each at its best for the others
    refit:         before each time, move the scales to their best for the codes, and do GPTQ anew with these scales;
                   each row stays as it was where that is not better
    """

    scale_dtype: torch.dtype
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    clip: Clip | None = None
    refine: int = 0
    refit: bool = False


def gptq(
    weight: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    damping: float = 0.01,
    act_order: bool = True,
    static_groups: bool = True,
    clip: Clip | None = None,
    refine: int = 0,
    refit: bool = False,
    cross: Tensor | None = None,
) -> Outcome:
    """Quantize a matrix; what is not told here is in Settings.

    weight: [out, in], of any float type; rows do not influence one another
    gram:   float32 [in, in], mean of x xᵀ over calibration tokens, on the device of the weight
    cross:  float32 [in, in], mean of d xᵀ, where x + d is what the input was before anything was quantized

    raises: RuntimeProblem where a value of the Gram matrix is not finite
    """
    settings = Settings(scale_dtype, damping, act_order, static_groups, clip, refine, refit)
    return gptq_stack([weight], [gram], grid, settings, None if cross is None else [cross])[0]


def gptq_on(weight: Tensor, gram: Tensor, grids: Sequence[Grid], settings: Settings) -> list[Quantized]:
    """The same on each of several grids, but for refinement: the Gram matrix is factored once."""
    job = _prepared(weight, gram, None, settings)
    if not isinstance(job, Job):
        return [rtn(weight, grid, scale_dtype=settings.scale_dtype, clip=settings.clip) for grid in grids]
    fitting = Fitting(settings.scale_dtype, settings.static_groups, settings.clip)
    return [quantize([job], grid, fitting)[0] for grid in grids]


def gptq_stack(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    grid: Grid,
    settings: Settings,
    crosses: Sequence[Tensor] | None = None,
) -> list[Outcome]:
    """Quantize several matrices of one shape: on a GPU all at once, as one alone leaves most of it idle."""
    jobs: dict[int, Job] = {}
    outcomes: list[Outcome | None] = [None] * len(weights)
    for i, (weight, gram) in enumerate(zip(weights, grams, strict=True)):
        prepared = _prepared(weight, gram, None if crosses is None else crosses[i], settings)
        if isinstance(prepared, Job):
            jobs[i] = prepared
        else:
            rounded = rtn(weight, grid, scale_dtype=settings.scale_dtype, clip=settings.clip)
            outcomes[i] = Outcome(rounded, None, prepared, int((gram.diagonal() == 0).sum()))
    fitting = Fitting(settings.scale_dtype, settings.static_groups, settings.clip)
    found = quantize(list(jobs.values()), grid, fitting)
    for (i, job), quantized in zip(jobs.items(), found, strict=True):
        if settings.refine:
            quantized = _refined(job, grams[i], quantized, grid, settings, fitting)
        outcomes[i] = Outcome(quantized, job.factor.damping, None, int(job.factor.dead.sum()))
    return [outcome for outcome in outcomes if outcome is not None]


def _prepared(weight: Tensor, gram: Tensor, cross: Tensor | None, settings: Settings) -> Job | str:
    """What is to be quantized, or why it can only be rounded."""
    order = gram.diagonal().argsort(descending=True, stable=True) if settings.act_order else None
    found = factor(gram, damping=settings.damping, permutation=order)
    if found is None:
        return "its Gram matrix is not positive definite, however damped"
    if bool(found.dead.all()):
        return "its inputs were all 0"
    target = weight if cross is None else _moved(weight, cross, found, order)
    return Job(target.masked_fill(found.dead, 0) if bool(found.dead.any()) else target, found, order)


def _moved(weight: Tensor, cross: Tensor, found: Factor, order: Tensor | None) -> Tensor:
    """W + W D G⁻¹."""
    solve = torch.linalg.solve_triangular
    change = weight.float() @ cross
    change = change if order is None else change.index_select(1, order)
    half = solve(found.upper.t(), change, upper=False, left=False, unitriangular=True).div_(found.pivots)
    change = solve(found.upper, half, upper=True, left=False, unitriangular=True)
    return weight + (change if order is None else change.index_select(1, order.argsort()))


def _refined(
    job: Job, gram: Tensor, quantized: Quantized, grid: Grid, settings: Settings, fitting: Fitting
) -> Quantized:
    more = added(gram, job.factor.damping)
    for _ in range(settings.refine):
        if settings.refit:
            refitted = refit_scales(job.weight, gram, more, quantized)
            again = quantize([replace(job, start=refitted)], grid, fitting)[0]
            quantized = better_rows(job.weight, gram, more, refitted, again)
        quantized = refine_codes(job.weight, gram, more, quantized, grid)
    return quantized
