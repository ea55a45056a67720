"""Learned rounding against its definition, written with loops, and what must hold whatever is learned."""

from collections.abc import Callable, Sequence
from math import floor

import pytest
import torch
from torch import Tensor

from quant.gptq import gptq
from quant.rtn import rtn
from quant.signround import EDGE, FACTORS, Rounding, Schedule, centre, learn
from wtool.grid import Grid, Quantized

GRIDS = [Grid(4, 8), Grid(3, 5), Grid(2, -1), Grid(4, 8, symmetric=False), Grid(3, 5, symmetric=False)]
SHAPES = [(6, 24), (3, 17), (5, 1), (1, 8)]


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(features: int, seed: int = 1) -> Tensor:
    inputs = drawn((4 * features, features), seed) @ drawn((features, features), seed + 1)
    return inputs.t() @ inputs / len(inputs)


def begun(weight: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[Quantized, Tensor]:
    """A start by GPTQ, and the points to round."""
    gram = gram_of(weight.shape[1])
    start = gptq(weight, gram, grid, scale_dtype=dtype, refine=1, refit=True).quantized
    return start, centre(weight, start, grid)


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
def test_it_begins_with_the_codes_of_the_start(grid: Grid, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = drawn(shape).masked_fill(drawn(shape, 9) > 1.5, 0).abs_() if grid.bits == 2 else drawn(shape)
    start, points = begun(weight, grid, dtype)
    matrix = Rounding(points, start, grid)
    first = matrix.quantized()
    assert torch.equal(first.codes, start.codes) and torch.equal(first.scales, start.scales)
    assert first.scales.dtype == dtype and first.codes.dtype == torch.int8
    assert torch.equal(values(matrix, shape), start.values())


@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
def test_points_are_the_weights_but_for_codes_that_are_not_the_nearest(grid: Grid) -> None:
    weight = drawn((6, 24))
    plain = rtn(weight, grid, scale_dtype=torch.float32)
    points = centre(weight, plain, grid)
    off = (points - weight).abs() / plain.scales.abs()[:, plain.group_index]
    assert float(off.max()) <= 0.5 - EDGE + 1e-5
    start, _ = begun(weight, grid)
    points = centre(weight, start, grid)
    scales = start.scales[:, start.group_index]
    zeros = 0 if start.zeros is None else start.zeros.float()[:, start.group_index]
    inside = (start.codes > grid.lowest) & (start.codes < grid.highest)
    off = (points / scales + zeros - start.codes).abs()[inside]
    assert float(off.max()) <= EDGE + 1e-4
    moved = inside & ((weight / scales + zeros - start.codes).abs() < EDGE)
    torch.testing.assert_close(points[moved], weight[moved])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_step_is_that_of_the_definition(grid: Grid, shape: tuple[int, int]) -> None:
    start, points = begun(drawn(shape), grid)
    matrix = Rounding(points, start, grid)
    width, groups = grid.width(shape[1]), grid.groups(shape[1])
    offsets = [[0.0] * shape[1] for _ in range(shape[0])]
    factors = [[1.0] * groups for _ in range(shape[0])]
    for number in range(4):
        slope, rate, scale_rate = drawn(shape, number + 5), 0.3 - 0.05 * number, 0.05
        matrix.step(slope, rate, scale_rate)
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
                sign = (by_factor[group] > 0) - (by_factor[group] < 0)
                factors[row][group] = min(max(factors[row][group] - scale_rate * sign, FACTORS[0]), FACTORS[1])
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
    start, points = begun(drawn((4, 12)), grid)
    matrix, slope = Rounding(points, start, grid), drawn((4, 12), 3)
    matrix.step(slope, 0.4, 0.0)  # so that codes and points are not all at rest
    before = matrix.offsets.flatten(1).double()
    moved = matrix.factors.clone()
    matrix.step(slope, 0.0, 0.25)
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


def test_groups_that_are_no_neighbours_are_kept_apart() -> None:
    grid, weight, gram = Grid(3, 4), drawn((5, 12)), gram_of(12)
    start = gptq(weight, gram, grid, scale_dtype=torch.float32, static_groups=False).quantized
    assert not torch.equal(start.group_index, grid.group_index(12))
    matrix = Rounding(centre(weight, start, grid), start, grid)
    assert torch.equal(matrix.quantized().codes, start.codes)
    slope = drawn((5, 12), 4)
    matrix.step(slope, 0.5, 0.0)
    moved = matrix.quantized().values() - start.values()
    assert bool((moved * slope <= 0).all()) and bool((moved != 0).any())
    torch.testing.assert_close(values(matrix, (5, 12)), matrix.quantized().values())


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
    return lambda: [Rounding(centre(weight, start, grid), start, grid) for weight, start in pairs], Regression(
        weights, 4
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_learned_lowers_the_loss_and_is_what_the_loss_was_of(symmetric: bool) -> None:
    begin, task = lesson(Grid(3, 8, symmetric))
    learned = learn(begin(), task, Schedule(60, 2, 1 / 60, 1 / 600, 0))
    assert 0 < learned.after < 0.8 * learned.before
    for now, quantized in zip(task._now, learned.matrices, strict=True):
        now.copy_(quantized.values())
    assert task.loss() == pytest.approx(learned.after, rel=1e-5)


@pytest.mark.parametrize("rate", [1e-3, 0.9])
def test_the_loss_is_never_larger_than_at_the_start(rate: float) -> None:
    for seed in range(5):
        begin, task = lesson(Grid(2, 8), seed)
        learned = learn(begin(), task, Schedule(3, 1, rate, rate, seed))
        assert learned.after <= learned.before


def test_no_steps_leave_the_start() -> None:
    begin, task = lesson(Grid(3, 8))
    learned = learn(begin(), task, Schedule(0, 2, 1.0, 1.0, 0))
    assert learned.after == learned.before
    for matrix, quantized in zip(begin(), learned.matrices, strict=True):
        assert torch.equal(matrix.quantized().codes, quantized.codes)


def test_offsets_stay_within_half_a_step() -> None:
    begin, task = lesson(Grid(3, 8))
    matrices, starts = begin(), begin()
    learn(matrices, task, Schedule(40, 2, 0.5, 0.0, 0))
    for matrix, start in zip(matrices, starts, strict=True):
        assert float(matrix.offsets.abs().max()) <= 0.5
        moved = matrix.quantized().codes.int() - start.quantized().codes.int()
        assert int(moved.abs().max()) == 1


def test_equal_seeds_learn_the_same() -> None:
    codes: list[Tensor] = []
    for seed in (3, 3, 4):
        begin, task = lesson(Grid(3, 8))
        learned = learn(begin(), task, Schedule(20, 2, 0.05, 0.01, seed))
        codes.append(torch.cat([quantized.codes.flatten() for quantized in learned.matrices]))
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
