"""What a grid would cost a matrix, against the definition with loops in float64."""

import pytest
import torch
from torch import Tensor

from quant.rtn import rtn
from quant.sensitivity import ROWS, losses
from wtool.grid import Grid


def inputs(features: int, tokens: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) * torch.linspace(
        0.1, 3, features
    )


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_loops(weight: Tensor, x: Tensor, grid: Grid, importance: Tensor | None) -> float:
    off = (weight - rtn(weight, grid, scale_dtype=torch.float32).values()).double()
    total = energy = 0.0
    for row in range(len(weight)):
        squares = [float(off[row] @ token.double()) ** 2 for token in x]
        factor = 1.0 if importance is None else 0.5 * float(importance[row])
        total += factor * sum(squares) / len(squares)
        energy += sum(float(weight[row].double() @ token.double()) ** 2 for token in x) / len(x)
    return total if importance is not None else total / energy


@pytest.mark.parametrize("shape", [(5, 12), (1, 8), (7, 1)])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_mean_squared_error_of_the_outputs(shape: tuple[int, int], weighted: bool) -> None:
    weight, x = weights(*shape), inputs(shape[1])
    importance = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) if weighted else None
    grids = [Grid(2, 4), Grid(4, 4, False), Grid(3, -1)]
    found = losses(weight, x.T @ x / len(x), grids, scale_dtype=torch.float32, clip=False, importance=importance)
    for grid, loss in zip(grids, found, strict=True):
        assert loss == pytest.approx(by_loops(weight, x, grid, importance), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("weighted", [True, False])
def test_some_rows_stand_for_all(weighted: bool) -> None:
    """Each of the evenly spread rows is there several times, so the estimate is exact."""
    few, x = weights(ROWS, 16), inputs(16)
    importance = torch.rand(ROWS) if weighted else None
    gram = x.T @ x / len(x)
    many = None if importance is None else importance.repeat_interleave(3)
    part = losses(few, gram, [Grid(3, 8)], scale_dtype=torch.float32, clip=True, importance=importance)
    whole = losses(
        few.repeat_interleave(3, 0), gram, [Grid(3, 8)], scale_dtype=torch.float32, clip=True, importance=many
    )
    assert whole[0] == pytest.approx(part[0] * (3 if weighted else 1), rel=1e-4)


def test_weights_and_inputs_of_zeros_cost_nothing() -> None:
    zeros, gram = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(8, 8)
    for weight in (zeros, weights(3, 8).bfloat16()):
        assert losses(weight, gram, [Grid(2, 8)], scale_dtype=torch.bfloat16, clip=True, importance=None) == [0.0]
    x = inputs(8)
    assert losses(zeros, x.T @ x, [Grid(2, 8)], scale_dtype=torch.bfloat16, clip=True, importance=torch.ones(3)) == [
        0.0
    ]
