"""What a grid would cost a matrix, against the definition with loops in float64."""

import pytest
import torch
from torch import Tensor

from quant.gptq import Settings, gptq
from quant.rtn import rtn
from quant.sensitivity import CLIP, ROWS, losses
from wtool.grid import Grid, Quantized


def inputs(features: int, tokens: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) * torch.linspace(
        0.1, 3, features
    )


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


SETTINGS = Settings(torch.float32)
CLIPPING = Settings(torch.bfloat16, clip=CLIP)


def by_loops(weight: Tensor, values: Tensor, x: Tensor, importance: Tensor | None) -> float:
    off = (weight - values).double()
    total = energy = 0.0
    for row in range(len(weight)):
        squares = [float(off[row] @ token.double()) ** 2 for token in x]
        factor = 1.0 if importance is None else 0.5 * float(importance[row])
        total += factor * sum(squares) / len(squares)
        energy += sum(float(weight[row].double() @ token.double()) ** 2 for token in x) / len(x)
    return total if importance is not None else total / energy


@pytest.mark.parametrize("shape", [(5, 12), (1, 8), (7, 1)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("compensating", [True, False])
def test_it_is_the_mean_squared_error_of_the_outputs(
    shape: tuple[int, int], weighted: bool, compensating: bool
) -> None:
    weight, x = weights(*shape), inputs(shape[1])
    gram = x.T @ x / len(x)
    importance = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) if weighted else None
    grids = [Grid(2, 4), Grid(4, 4, False), Grid(3, -1)]
    found = losses(weight, gram, grids, settings=SETTINGS, compensating=compensating, importance=importance)
    for grid, loss in zip(grids, found, strict=True):
        quantized = (
            gptq(weight, gram, grid, scale_dtype=torch.float32).quantized if compensating else rounded(weight, grid)
        )
        assert loss == pytest.approx(by_loops(weight, quantized.values(), x, importance), rel=1e-4, abs=1e-9)


def rounded(weight: Tensor, grid: Grid) -> Quantized:
    return rtn(weight, grid, scale_dtype=torch.float32)


def test_large_inputs_cost_little_where_columns_make_up_for_them() -> None:
    """Two inputs that go along with one another, a hundred times as large as all others: rounding errs by both."""
    x = inputs(32, tokens=256)
    x[:, 3] *= 100
    x[:, 9] = x[:, 3]
    weight, gram = weights(16, 32), x.T @ x / len(x)
    by_gptq, by_rounding = (
        losses(weight, gram, [Grid(4, 32)], settings=SETTINGS, compensating=compensating, importance=None)[0]
        for compensating in (True, False)
    )
    assert by_gptq < by_rounding / 2


@pytest.mark.parametrize("weighted", [True, False])
def test_some_rows_stand_for_all(weighted: bool) -> None:
    """Each of the evenly spread rows is there several times, so the estimate is exact."""
    few, x = weights(ROWS, 16), inputs(16)
    importance = torch.rand(ROWS) if weighted else None
    gram = x.T @ x / len(x)
    many = None if importance is None else importance.repeat_interleave(3)
    tripled = few.repeat_interleave(3, 0)
    part = losses(few, gram, [Grid(3, 8)], settings=CLIPPING, compensating=True, importance=importance)
    whole = losses(tripled, gram, [Grid(3, 8)], settings=CLIPPING, compensating=True, importance=many)
    assert whole[0] == pytest.approx(part[0] * (3 if weighted else 1), rel=1e-4)


@pytest.mark.parametrize("compensating", [True, False])
def test_weights_and_inputs_of_zeros_cost_nothing(compensating: bool) -> None:
    def loss(weight: Tensor, gram: Tensor, importance: Tensor | None) -> float:
        grids = [Grid(2, 8)]
        return losses(weight, gram, grids, settings=CLIPPING, compensating=compensating, importance=importance)[0]

    zeros, x = torch.zeros(3, 8, dtype=torch.bfloat16), inputs(8)
    for weight in (zeros, weights(3, 8).bfloat16()):
        assert loss(weight, torch.zeros(8, 8), None) == 0
    assert loss(zeros, x.T @ x, torch.ones(3)) == 0
