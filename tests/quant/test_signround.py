"""Learned rounding against its definition, written with loops, and what must hold whatever is learned."""

from collections.abc import Callable, Sequence
from math import floor

import pytest
import torch
from torch import Tensor

from quant.rtn import rtn
from quant.signround import FACTORS, REFITS, Rounding, Schedule, begun, learn
from wtool.grid import Clip, Grid, Quantized, encode

GRIDS = [Grid(4, 8), Grid(3, 5), Grid(2, -1), Grid(4, 8, symmetric=False), Grid(3, 5, symmetric=False)]
SHAPES = [(6, 24), (3, 17), (5, 1), (1, 8)]


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[Quantized, Tensor]:
    """What is begun with, and the weights."""
    return begun(weight, drawn((weight.shape[1],), 1).square(), grid, scale_dtype=dtype, clip=Clip()), weight


def values(matrix: Rounding, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(tuple(shape), torch.nan, dtype=dtype)
    matrix.values(out)
    return out


def rounded(point: float, scale: float, zero: float, offset: float, grid: Grid) -> tuple[float, bool]:
    """The code, less the zero, of one weight by the definition, and whether it was clipped."""
    exact = point / scale + offset + zero
    near = floor(exact + 0.5)
    code = min(max(near, grid.lowest), grid.highest)
    return code - zero, code != near


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_begins_with_the_nearest_codes_on_the_grid_of_the_start(
    grid: Grid, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = drawn(shape).masked_fill(drawn(shape, 9) > 1.5, 0).abs_() if grid.bits == 2 else drawn(shape)
    start, _ = started(weight, grid, dtype)
    given = weight.clone()
    matrix = Rounding(given, start, grid)
    given.fill_(torch.nan)  # it keeps nothing of the tensor it was given
    first = matrix.quantized()
    nearest = encode(weight, start.scales, start.zeros, start.group_index, grid)
    assert torch.equal(first.codes, nearest) and torch.equal(first.scales, start.scales)
    assert first.scales.dtype == dtype and first.codes.dtype == torch.int8
    assert torch.equal(values(matrix, shape), first.values())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_step_is_that_of_the_definition(grid: Grid, shape: tuple[int, int]) -> None:
    start, points = started(drawn(shape), grid)
    matrix = Rounding(points, start, grid)
    width, groups = grid.width(shape[1]), grid.groups(shape[1])
    offsets = [[0.0] * shape[1] for _ in range(shape[0])]
    factors = [[1.0] * groups for _ in range(shape[0])]
    for number in range(4):
        slope, rate = drawn(shape, number + 5), 0.15 - 0.02 * number
        matrix.step(slope.clone(), rate)
        for row in range(shape[0]):
            by_factor = [0.0] * groups
            for column in range(shape[1]):
                group = column // width
                first = float(start.scales[row, group])
                zero = 0.0 if start.zeros is None else float(start.zeros[row, group])
                scale, point = first * factors[row][group], float(points[row, column])
                code, clipped = rounded(point, scale, zero, offsets[row][column], grid)
                own = float(slope[row, column])
                by_factor[group] += own * first * (code - (0 if clipped else point / scale))
                sign = (own * scale > 0) - (own * scale < 0)
                offsets[row][column] = min(max(offsets[row][column] - rate * sign, -0.5), 0.5)
            for group in range(groups):
                if abs(by_factor[group]) < 1e-6:  # nothing but what float32 rounds away
                    factors[row][group] = float(matrix.factors[row, group])
                    continue
                sign = (by_factor[group] > 0) - (by_factor[group] < 0)
                factors[row][group] = min(max(factors[row][group] - rate * sign, FACTORS[0]), FACTORS[1])
        found = matrix.quantized()
        for row in range(shape[0]):
            for column in range(shape[1]):
                group = column // width
                zero = 0.0 if start.zeros is None else float(start.zeros[row, group])
                scale = float(start.scales[row, group]) * factors[row][group]
                code, _ = rounded(float(points[row, column]), scale, zero, offsets[row][column], grid)
                exact = float(points[row, column]) / scale + zero + offsets[row][column]
                if abs(exact - floor(exact) - 0.5) > 1e-4:  # not where float32 may round the other way
                    assert int(found.codes[row, column]) - zero == code
                assert float(found.scales[row, group]) == pytest.approx(scale, rel=1e-5)


def test_the_gradient_of_a_scale_is_that_of_the_straight_through_function() -> None:
    """By finite differences of what the definition makes of rounding: its value here, the identity beside it."""
    grid = Grid(3, 6, symmetric=True)
    start, points = started(drawn((4, 12)), grid)
    matrix, slope = Rounding(points, start, grid), drawn((4, 12), 3)
    matrix.step(slope.clone(), 0.4)  # so that codes and points are not all at rest
    matrix.factors.fill_(1)
    before = matrix.offsets.flatten(1).double()
    moved = matrix.factors.clone()
    matrix.step(slope.clone(), 0.25)
    signs = (moved - matrix.factors).sign()

    def loss(factors: Tensor) -> Tensor:
        scales = (start.scales.double() * factors).repeat_interleave(6, dim=1)
        first = start.scales.double().repeat_interleave(6, dim=1)
        still = points.double() / first + before
        held = (still.round() - still).detach()  # what rounding adds, which stays
        through, limited = points.double() / scales + before + held, still.round().clamp(grid.lowest, grid.highest)
        through = torch.where(limited == still.round(), through, limited)
        return (slope.double() * scales * through).unflatten(1, (2, 6)).sum(2)

    ones, tiny = torch.ones(4, 2, dtype=torch.float64), 1e-7
    slopes = (loss(ones + tiny) - loss(ones - tiny)) / (2 * tiny)
    assert torch.equal(signs.double(), slopes.sign())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_begun_with_is_that_of_the_definition(grid: Grid, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, squares = drawn(shape), drawn((shape[1],), 1).square()
    weight[0, : grid.width(shape[1])] = 0  # a group that says nothing
    found = begun(weight, squares, grid, scale_dtype=dtype, clip=Clip())
    now = rtn(weight, grid, scale_dtype=dtype, clip=Clip())
    for _ in range(REFITS):
        scales = now.scales.clone()
        for row in range(shape[0]):
            for group in range(grid.groups(shape[1])):
                asked = spread = 0.0
                for column in range(group * grid.width(shape[1]), min((group + 1) * grid.width(shape[1]), shape[1])):
                    zero = 0 if now.zeros is None else int(now.zeros[row, group])
                    code, counts = int(now.codes[row, column]) - zero, float(squares[column])
                    asked += counts * float(weight[row, column]) * code
                    spread += counts * code * code
                if asked != 0:
                    scales[row, group] = asked / spread
        now = Quantized(encode(weight, scales, now.zeros, now.group_index, grid), scales, now.zeros, now.group_index)
    assert found.scales.dtype == dtype
    torch.testing.assert_close(found.scales, now.scales, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=0)
    assert torch.equal(found.codes, encode(weight, found.scales, found.zeros, found.group_index, grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weighted_errors_are_no_larger_than_those_of_rounding(grid: Grid) -> None:
    weight, squares = drawn((16, 40)), drawn((40,), 1).square()
    ours = begun(weight, squares, grid, scale_dtype=torch.float32, clip=Clip())
    plain = rtn(weight, grid, scale_dtype=torch.float32, clip=Clip())
    errors = [((weight - each.values()).square() * squares).sum(1) for each in (ours, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all()) and float(errors[0].sum()) < 0.99 * float(errors[1].sum())


class Regression:
    """Matrices in a row, with something bent between them: what each is to be, taken together."""

    def __init__(self, weights: Sequence[Tensor], batches: int):
        features = weights[0].shape[1]
        mixed = drawn((features, features), 19)
        self._inputs = [drawn((32, features), 20 + i) @ mixed / 4 for i in range(batches)]
        self._targets = [self._output(inputs, weights) for inputs in self._inputs]
        self._now = [weight.clone() for weight in weights]

    @property
    def batches(self) -> int:
        return len(self._inputs)

    @staticmethod
    def _output(inputs: Tensor, weights: Sequence[Tensor]) -> Tensor:
        for weight in weights:
            inputs = torch.tanh(inputs @ weight.t())
        return inputs

    def put(self, matrices: Sequence[Rounding]) -> None:
        for matrix, now in zip(matrices, self._now, strict=True):
            matrix.values(now)

    def gradients(self, batches: Sequence[int]) -> list[Tensor | None]:
        leaves = [now.clone().requires_grad_(True) for now in self._now]
        with torch.enable_grad():
            errors = [self._output(self._inputs[i], leaves) - self._targets[i] for i in batches]
            torch.cat(errors).square().mean().backward()
        return [leaf.grad for leaf in leaves]

    def loss(self) -> float:
        errors = [self._output(*pair) for pair in zip(self._inputs, [self._now] * self.batches, strict=True)]
        pairs = zip(errors, self._targets, strict=True)
        return float(torch.stack([(found - target).square().mean() for found, target in pairs]).mean())


def lesson(grid: Grid, seed: int = 0) -> tuple[Callable[[], list[Rounding]], Regression]:
    weights = [drawn((16, 16), seed) / 4, drawn((8, 16), seed + 1) / 4]
    starts = [rtn(weight, grid, scale_dtype=torch.float32) for weight in weights]
    pairs = list(zip(weights, starts, strict=True))
    return lambda: [Rounding(weight, start, grid) for weight, start in pairs], Regression(weights, 4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_learned_lowers_the_loss_and_is_what_the_loss_is_of(symmetric: bool) -> None:
    begin, task = lesson(Grid(3, 8, symmetric))
    matrices = begin()
    task.put(matrices)
    before = task.loss()
    learn(matrices, task, Schedule(60, 2, 1 / 60, 0))
    assert 0 < (after := task.loss()) < 0.8 * before
    for now, matrix in zip(task._now, matrices, strict=True):
        now.copy_(matrix.quantized().values())
    assert task.loss() == pytest.approx(after, rel=1e-5)


def test_no_steps_leave_the_start() -> None:
    begin, task = lesson(Grid(3, 8))
    matrices = begin()
    learn(matrices, task, Schedule(0, 2, 1.0, 0))
    for matrix, first in zip(matrices, begin(), strict=True):
        assert torch.equal(matrix.quantized().codes, first.quantized().codes)


def test_offsets_and_factors_stay_within_their_bounds() -> None:
    begin, task = lesson(Grid(3, 8))
    matrices = begin()
    learn(matrices, task, Schedule(40, 2, 0.5, 0))
    for matrix in matrices:
        assert float(matrix.offsets.abs().max()) == 0.5
        assert FACTORS[0] <= float(matrix.factors.min()) and float(matrix.factors.max()) <= FACTORS[1]


def test_equal_seeds_learn_the_same() -> None:
    codes: list[Tensor] = []
    for seed in (3, 3, 4):
        begin, task = lesson(Grid(3, 8))
        learn(matrices := begin(), task, Schedule(20, 2, 0.05, seed))
        codes.append(torch.cat([matrix.quantized().codes.flatten() for matrix in matrices]))
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
