"""Matrices of one shape made a stack that can be swept over, and a stack that was made matrices again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wtool.grid import Clip, Grid, Quantized, fit
from wtool.statistics import Factor

from .sweep import Scales, sweep

_ROWS = 8192  # of a weight at a time on the processor: more leave its cache, fewer are more calls


@dataclass(frozen=True)
class Job:
    """A weight that can be quantized."""

    weight: Tensor  # [out, in], 0 where inputs are dead
    factor: Factor
    order: Tensor | None  # of the factor; None for the natural one
    start: Quantized | None = None  # whose scales to take


@dataclass(frozen=True)
class Fitting:
    """How scales are found."""

    dtype: torch.dtype
    static: bool  # from the weights as they were, of groups of neighbours
    clip: Clip | None


def quantize(jobs: Sequence[Job], grid: Grid, fitting: Fitting) -> list[Quantized]:
    """GPTQ of matrices of one shape, on the processor one after the other."""
    if not jobs or jobs[0].weight.is_cuda:
        return sweep_stack(jobs, grid, fitting) if jobs else []
    return [joined([sweep_stack([part], grid, fitting)[0] for part in _parts(job)]) for job in jobs]


def sweep_stack(jobs: Sequence[Job], grid: Grid, fitting: Fitting) -> list[Quantized]:
    """GPTQ of matrices of one shape in one sweep; all or none of the jobs have a start."""
    columns = jobs[0].weight.shape[1]
    static = fitting.static or grid.groups(columns) == 1 or jobs[0].start is not None
    scales = _static_scales(jobs, grid, fitting) if static else _room(jobs, grid)
    upper = _stacked([job.factor.upper for job in jobs])
    errors = _stacked([_laid(job) for job in jobs])
    values = errors.clone()

    def fit_group(group: int, part: slice) -> None:
        # the columns of the group have yet to make up for one another; until they are rounded, they do so in full
        lacking = torch.linalg.solve_triangular(
            upper[:, part, part].mT, values[:, part] - errors[:, part], upper=False, unitriangular=True
        )
        found = _fitted(list((errors[:, part] + lacking).mT), replace(grid, group_size=-1), fitting)
        scales.scales[:, group] = found[0][:, 0]
        if scales.zeros is not None and found[1] is not None:
            scales.zeros[:, group] = found[1][:, 0]

    sweep(values, errors, upper, scales, grid, before_group=None if static else fit_group)
    return [_natural(values[i], scales, i, job.order, fitting.dtype) for i, job in enumerate(jobs)]


def _static_scales(jobs: Sequence[Job], grid: Grid, fitting: Fitting) -> Scales:
    """Scales, zeros and groups known before the sweep, from the starts or else from the weights."""
    starts = [job.start for job in jobs if job.start is not None]
    if starts:
        parts = [(start.scales, start.zeros, start.group_index) for start in starts]
        scales = _stacked([part.float().t().contiguous() for part, _, _ in parts])
        zeros = [part.float().t().contiguous() for _, part, _ in parts if part is not None]
        found, groups = (scales, _stacked(zeros) if zeros else None), [part for _, _, part in parts]
    else:
        found = _fitted([job.weight for job in jobs], grid, fitting)
        groups = [grid.group_index(jobs[0].weight.shape[1], jobs[0].weight.device)] * len(jobs)
    ordered = [group if job.order is None else group[job.order] for group, job in zip(groups, jobs, strict=True)]
    return Scales(*found, _stacked(ordered))


def _room(jobs: Sequence[Job], grid: Grid) -> Scales:
    """Room for scales and zeros of groups that follow one another in the order."""
    (rows, columns), device = jobs[0].weight.shape, jobs[0].weight.device
    scales = torch.empty(len(jobs), grid.groups(columns), rows, device=device)
    zeros = None if grid.symmetric else torch.empty_like(scales)
    return Scales(scales, zeros, _stacked([grid.group_index(columns, device)] * len(jobs)))


def _fitted(weights: Sequence[Tensor], grid: Grid, fitting: Fitting) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of weights [out, in], float32 [n, groups, out], with the values that are stored."""
    rows = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    scales, zeros = fit(rows, grid, dtype=fitting.dtype, clip=fitting.clip)
    shape = (len(weights), -1, scales.shape[1])
    laid = scales.float().reshape(shape).mT.contiguous()
    return laid, None if zeros is None else zeros.float().reshape(shape).mT.contiguous()


def _laid(job: Job) -> Tensor:
    """The weight as the sweep wants it, float32 [in, out] in its order; always new memory."""
    lying = job.weight.float().t()
    if job.order is None:
        return lying.clone(memory_format=torch.contiguous_format)
    return lying.contiguous().index_select(0, job.order)


def _natural(values: Tensor, scales: Scales, i: int, order: Tensor | None, dtype: torch.dtype) -> Quantized:
    """One matrix of a stack, with its columns as they were."""
    codes, group = values.to(torch.int8), scales.group_index[i]
    if order is not None:
        back = order.argsort()
        codes, group = codes.index_select(0, back), group[back]
    return Quantized(
        codes.t().contiguous(),
        scales.scales[i].t().to(dtype, memory_format=torch.contiguous_format),
        None if scales.zeros is None else scales.zeros[i].t().to(torch.int8, memory_format=torch.contiguous_format),
        group,
    )


def _parts(job: Job) -> list[Job]:
    """Jobs of a part of the rows each."""
    pieces = -(-len(job.weight) // _ROWS)
    start = [None] * pieces if job.start is None else _cut(job.start, pieces)
    weights = job.weight.tensor_split(pieces)
    return [replace(job, weight=weight, start=own) for weight, own in zip(weights, start, strict=True)]


def _cut(whole: Quantized, pieces: int) -> list[Quantized]:
    codes, scales = whole.codes.tensor_split(pieces), whole.scales.tensor_split(pieces)
    zeros = [None] * pieces if whole.zeros is None else whole.zeros.tensor_split(pieces)
    return [Quantized(*part, whole.group_index) for part in zip(codes, scales, zeros, strict=True)]


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Rows of a quantized matrix after one another."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Quantized(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].group_index,
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
