"""Learned rounding: each code moves by at most about one step, as the output of the whole block asks for.

Cheng, Zhang, Shen, Cai, He, Lv and Liu, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs", 2023, https://arxiv.org/abs/2309.05516. With offsets V in [-0.5, 0.5] of the weights and factors a of the scales,

    Q = s · (clip(round(W / s + V + z)) - z),    s = a · s0          (equations 3 and 4)
    V, a  ←  V, a - rate · sign(gradient),        rate falling to 0   (equations 5 and 6)

the gradient that of the error of the block's outputs (`wtool.block_fit` tells which), rounding taken for the identity
(straight through):

    dQ/dV = s,    dQ/ds = (code - z) - W / s     where nothing is clipped, and code - z where it is.

Here it starts from codes that another method found, and not from those that are nearest. So W gives way to the point T
that these codes are the nearest to, as near W as can be. V = 0 and a = 1 are the start. Zeros stay what they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from wtool.grid import Grid, Quantized

EDGE = 0.499  # of a step: how far from its code at most a weight begins
FARTHEST = 0.5  # that V may move a weight, in steps
FACTORS = (0.5, 1.5)  # of the scales
_CHUNK = 1 << 16  # weights at a time, so that what is computed from them stays in the processor's cache


def centre(weight: Tensor, start: Quantized, grid: Grid) -> Tensor:
    """The points to be rounded, float32 [out, in]: of those that have the start's codes, the nearest to W."""
    scales = start.scales.float()[:, start.group_index]
    codes = start.codes.float()
    zeros = 0 if start.zeros is None else start.zeros.float()[:, start.group_index]
    exact = weight.float() / scales + zeros
    low = torch.where(codes == grid.lowest, exact.clamp(max=grid.lowest), codes - EDGE)  # what is clipped stays so
    high = torch.where(codes == grid.highest, exact.clamp(min=grid.highest), codes + EDGE)
    low, high = torch.minimum(low, codes - EDGE), torch.maximum(high, codes + EDGE)
    return (torch.minimum(torch.maximum(exact, low), high) - zeros) * scales


class Rounding:
    """A matrix while its rounding is learned."""

    def __init__(self, points: Tensor, start: Quantized, grid: Grid):
        """points: what `centre` gives, [out, in]"""
        self._grid, self._start = grid, start
        index = start.group_index
        self._columns, self._width = len(index), grid.width(len(index))
        neighbours = torch.equal(index, grid.group_index(len(index), index.device))
        self._order = None if neighbours else index.argsort(stable=True)
        self._points = self._grouped(points)
        self._step = max(1, _CHUNK // len(index)) if points.device.type == "cpu" else len(points)
        self.offsets = torch.zeros_like(self._points)  # V, [out, groups, width]
        self.factors = torch.ones_like(start.scales, dtype=torch.float32)  # a, [out, groups]

    def values(self, out: Tensor) -> None:
        """Put the rounded weights into a tensor [out, in], of any float type."""
        for rows in self._chunks():
            scales, _, codes, _ = self._at(rows)
            out[rows] = self._flat(codes.mul_(scales))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Go one step down.

        gradient: [out, in], of the loss by the rounded weights
        """
        for rows in self._chunks():
            slope = self._grouped(gradient[rows].float())
            scales, exact, codes, clipped = self._at(rows)
            by_scale = codes.sub_(exact.masked_fill_(clipped, 0)).mul_(slope).sum(dim=2)
            by_factor = by_scale.mul_(self._start.scales[rows].float())
            self.factors[rows].sub_(by_factor.sign_(), alpha=scale_rate).clamp_(*FACTORS)
            self.offsets[rows].sub_(slope.mul_(scales).sign_(), alpha=rate).clamp_(-FARTHEST, FARTHEST)

    def quantized(self) -> Quantized:
        """The codes and scales as they stand."""
        codes = [self._at(rows)[2].add_(self._zeros(rows)).to(torch.int8) for rows in self._chunks()]
        flat = self._flat(torch.cat(codes)).contiguous()
        return replace(self._start, codes=flat, scales=self._scales(slice(None)))

    def _at(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of some rows: scales [rows, groups, 1]; [rows, groups, width]: T / s, codes less zeros, what is clipped."""
        scales, zeros = self._scales(rows).float()[:, :, None], self._zeros(rows)
        exact = self._points[rows] / scales
        moved = (exact + self.offsets[rows]).add_(zeros).round_()
        codes = moved.clamp(self._grid.lowest, self._grid.highest)
        return scales, exact, codes.sub(zeros), codes != moved

    def _scales(self, rows: slice) -> Tensor:
        """The scales as they are stored, [rows, groups]."""
        first = self._start.scales[rows]
        limits = torch.finfo(first.dtype)
        moved = first.float() * self.factors[rows]
        return torch.copysign(moved.abs().clamp(limits.tiny, limits.max), moved).to(first.dtype)

    def _zeros(self, rows: slice) -> Tensor | float:
        return 0.0 if self._start.zeros is None else self._start.zeros[rows].float()[:, :, None]

    def _chunks(self) -> Iterator[slice]:
        rows = len(self._points)
        return (slice(begin, min(begin + self._step, rows)) for begin in range(0, rows, self._step))

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[rows, groups, width] of [rows, in], with zeros where the last group is short."""
        matrix = matrix if self._order is None else matrix[:, self._order]
        return pad(matrix, (0, -self._columns % self._width)).unflatten(1, (-1, self._width))

    def _flat(self, grouped: Tensor) -> Tensor:
        """[rows, in] again."""
        matrix = grouped.flatten(1)[:, : self._columns]
        return matrix if self._order is None else matrix[:, self._order.argsort()]


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

    def loss(self) -> float:
        """The loss over all batches."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How to go down."""

    steps: int
    batches: int  # that the gradient of a step is of
    rate: float  # of the first step, in steps of the grid
    scale_rate: float  # the same of the scales, in shares of them
    seed: int


@dataclass(frozen=True)
class Learned:
    """What was learned."""

    matrices: list[Quantized]
    before: float  # the loss over all batches
    after: float  # never larger


def learn(matrices: Sequence[Rounding], task: Task, schedule: Schedule) -> Learned:
    """Learn the rounding of a block's matrices together."""
    task.put(matrices)
    best = Learned([matrix.quantized() for matrix in matrices], before := task.loss(), before)
    for step, batches in enumerate(_draws(task.batches, schedule)):
        left = 1 - step / schedule.steps
        gradients = task.gradients(batches)
        for matrix, gradient in zip(matrices, gradients, strict=True):
            if gradient is not None:
                matrix.step(gradient, schedule.rate * left, schedule.scale_rate * left)
        task.put(matrices)
        if (step + 1) in _looks(schedule.steps) and (loss := task.loss()) < best.after:
            best = Learned([matrix.quantized() for matrix in matrices], before, loss)
    return best


def _looks(steps: int) -> set[int]:
    """After which steps the loss over all batches is computed: with a falling rate, the best come last."""
    return {steps, -(-3 * steps // 4)}


def _draws(batches: int, schedule: Schedule) -> Iterator[list[int]]:
    """The batches of each step: all in a random order, then all in another."""
    generator = torch.Generator().manual_seed(schedule.seed)
    waiting: list[int] = []
    for _ in range(schedule.steps):
        if len(waiting) < min(schedule.batches, batches):
            waiting = torch.randperm(batches, generator=generator).tolist()
        taken, waiting = waiting[: schedule.batches], waiting[schedule.batches :]
        yield taken
