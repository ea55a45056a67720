"""Learned rounding: each code moves by at most about one step, as the output of the whole block asks for.

Cheng, Zhang, Shen, Cai, He, Lv and Liu, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs", 2023, https://arxiv.org/abs/2309.05516. With offsets V in [-0.5, 0.5] of the weights and factors a of the scales,

    Q = s · (clip(round(W / s + V + z)) - z),    s = a · s0          (equations 3 and 4)
    V, a  ←  V, a - rate · sign(gradient),        rate falling to 0   (equations 5 and 6)

the gradient that of the error of the block's outputs (`wtool.block_fit` tells which), rounding taken for the identity
(straight through):

    dQ/dV = s,    dQ/ds = (code - z) - W / s     where nothing is clipped, and code - z where it is.

Here s0 are not the scales that cover each group's largest weight. Those of a search for the best share of the range to
cover are moved, twice, to the best for the codes that are nearest with them, an error in a column counting as much as
the mean square h of its inputs:

    s0  ←  Σ h W c / Σ h c²  over each group,   c = code - z

Zeros stay what they are. Starting from codes of GPTQ's was worse: they are far from W where that serves the
calibration's tokens, and what is learned from there does not serve others (docs/quantizing.md has the figures).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from wtool.grid import Clip, Grid, Quantized, encode, some_rows

from .rtn import rtn

FARTHEST = 0.5  # that V may move a weight, in steps
FACTORS = (0.5, 1.5)  # of the scales
REFITS = 2  # of the scales that are begun with
_CHUNK = 1 << 18  # weights at a time: little more memory, and not so few that starting each operation counts


def begun(
    weight: Tensor, squares: Tensor, grid: Grid, *, scale_dtype: torch.dtype, clip: Clip | None = None
) -> Quantized:
    """The scales to begin with, and the nearest codes.

    weight:      [out, in], of any float type
    squares:     float32 [in], > 0: how much an error in each column counts
    scale_dtype: the type that scales are stored in
    clip:        a search for the share of each group's range to cover; None covers all of it
    """
    quantized = rtn(weight, grid, scale_dtype=scale_dtype, clip=clip)
    for _ in range(REFITS):
        scales = torch.cat([_refitted(weight[rows], squares, quantized.rows(rows)) for rows in some_rows(weight)])
        codes = encode(weight, scales, quantized.zeros, quantized.group_index, grid)
        quantized = replace(quantized, codes=codes, scales=scales)
    return quantized


def _refitted(weight: Tensor, squares: Tensor, quantized: Quantized) -> Tensor:
    """The scales [out, groups] that are best for the codes; as they were where no code of a group says anything."""
    codes, scales, index = quantized.codes.float(), quantized.scales, quantized.group_index
    if quantized.zeros is not None:
        codes -= quantized.zeros.float()[:, index]
    weighted, none = codes * squares, torch.zeros_like(scales, dtype=torch.float32)
    best = none.index_add(1, index, weighted * weight.float()) / none.index_add(1, index, weighted * codes)
    best = best.to(scales.dtype)
    return torch.where(best.isfinite() & (best != 0), best, scales)


class Rounding:
    """A matrix while its rounding is learned."""

    def __init__(self, weight: Tensor, start: Quantized, grid: Grid):
        """
        weight: [out, in], of any float type; may change afterwards
        start: whose scales and zeros are begun with; not its codes. Its groups are of neighbours
        """
        self._grid, self._start = grid, start
        self._columns = weight.shape[1]
        self._width = grid.width(self._columns)
        self._weights = self._grouped(weight.to(torch.float32, copy=True))
        self._step = max(1, _CHUNK // self._columns) if weight.device.type == "cpu" else len(weight)
        self.offsets = torch.zeros_like(self._weights)  # V, [out, groups, width]
        self.factors = torch.ones_like(start.scales, dtype=torch.float32)  # a, [out, groups]

    def values(self, out: Tensor) -> None:
        """Put the rounded weights into a tensor [out, in], of any float type."""
        for rows in self._chunks():
            scales, zeros = self._grid_of(rows)
            codes = self._codes(rows, scales, zeros)
            out[rows] = self._flat((codes if zeros is None else codes.sub_(zeros)).mul_(scales))

    def step(self, gradient: Tensor, rate: float) -> None:
        """Go one step down.

        gradient: [out, in], of the loss by the rounded weights; may be overwritten
        """
        for rows in self._chunks():
            slope = self._grouped(gradient[rows].float())
            scales, zeros = self._grid_of(rows)
            exact = self._weights[rows] / scales
            codes = exact + self.offsets[rows]
            codes = (codes if zeros is None else codes.add_(zeros)).round_()
            inside = codes.clone()
            codes.clamp_(self._grid.lowest, self._grid.highest)
            inside.eq_(codes)  # 1 where nothing is clipped, else 0; ten times faster than with bools
            codes.addcmul_(exact, inside, value=-1)
            by_scale = (codes if zeros is None else codes.sub_(zeros)).mul_(slope).sum(dim=2)
            by_factor = by_scale.mul_(self._start.scales[rows].float())
            self.factors[rows].sub_(by_factor.sign_(), alpha=rate).clamp_(*FACTORS)
            offsets = self.offsets[rows]  # dQ/dV is a scale, which may be negative
            offsets.addcmul_(slope.sign_(), scales.sign_(), value=-rate).clamp_(-FARTHEST, FARTHEST)

    def quantized(self) -> Quantized:
        """The codes and scales as they stand."""
        codes = [self._codes(rows, *self._grid_of(rows)).to(torch.int8) for rows in self._chunks()]
        flat = self._flat(torch.cat(codes)).contiguous()
        return replace(self._start, codes=flat, scales=self._scales(slice(None)))

    def _codes(self, rows: slice, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Of some rows, float32 [rows, groups, width]."""
        exact = torch.div(self._weights[rows], scales).add_(self.offsets[rows])
        codes = (exact if zeros is None else exact.add_(zeros)).round_()
        return codes.clamp_(self._grid.lowest, self._grid.highest)

    def _grid_of(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The scales and zeros of some rows, [rows, groups, 1]."""
        zeros = self._start.zeros
        return self._scales(rows).float()[:, :, None], None if zeros is None else zeros[rows].float()[:, :, None]

    def _scales(self, rows: slice) -> Tensor:
        """The scales as they are stored, [rows, groups]."""
        first = self._start.scales[rows]
        limits = torch.finfo(first.dtype)
        moved = first.float() * self.factors[rows]
        return torch.copysign(moved.abs().clamp(limits.tiny, limits.max), moved).to(first.dtype)

    def _chunks(self) -> Iterator[slice]:
        rows = len(self._weights)
        return (slice(begin, min(begin + self._step, rows)) for begin in range(0, rows, self._step))

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[rows, groups, width] of [rows, in], with zeros where the last group is short."""
        short = -self._columns % self._width
        return (pad(matrix, (0, short)) if short else matrix).unflatten(1, (-1, self._width))

    def _flat(self, grouped: Tensor) -> Tensor:
        """[rows, in] again."""
        return grouped.flatten(1)[:, : self._columns]


class Task(Protocol):
    """What is to be learned from."""

    @property
    def batches(self) -> int: ...

    def put(self, matrices: Sequence[Rounding]) -> None:
        """Have the block compute with matrices as they stand."""
        ...

    def gradients(self, batches: Sequence[int]) -> list[Tensor | None]:
        """Of the loss over some batches, by each of the matrices [out, in]; None where there is none."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How to go down."""

    steps: int
    batches: int  # that the gradient of a step is of
    rate: float  # of the first step: in steps of the grid for V, in shares of the scales for a
    seed: int


def learn(matrices: Sequence[Rounding], task: Task, schedule: Schedule) -> None:
    """Learn the rounding of a block's matrices together; the block is left computing with what was learned."""
    task.put(matrices)
    for step, batches in enumerate(_draws(task.batches, schedule)):
        left = 1 - step / schedule.steps
        gradients = task.gradients(batches)
        for matrix, gradient in zip(matrices, gradients, strict=True):
            if gradient is not None:
                matrix.step(gradient, schedule.rate * left)
        task.put(matrices)


def _draws(batches: int, schedule: Schedule) -> Iterator[list[int]]:
    """The batches of each step: all in a random order, then all in another."""
    generator = torch.Generator().manual_seed(schedule.seed)
    waiting: list[int] = []
    for _ in range(schedule.steps):
        if len(waiting) < min(schedule.batches, batches):
            waiting = torch.randperm(batches, generator=generator).tolist()
        taken, waiting = waiting[: schedule.batches], waiting[schedule.batches :]
        yield taken
