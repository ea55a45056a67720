"""What the principal directions are, and what they are of."""

import pytest
import torch
from torch import Tensor

from prune.rotate import principal_directions, unit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(random(size, size).double()).Q


def test_principal_directions_are_orthonormal_and_the_first_hold_the_most() -> None:
    tokens = random(200, 6).double() @ torch.diag(torch.tensor([0.1, 3, 1, 0, 2, 0.5]).double()) @ orthogonal(6)
    moment = tokens.T @ tokens / 200
    directions = principal_directions(moment)
    assert directions.dtype == torch.float64
    torch.testing.assert_close(directions.T @ directions, torch.eye(6).double())
    energies = directions.T @ moment @ directions
    torch.testing.assert_close(energies, torch.diag(energies.diagonal()), rtol=0, atol=1e-12)
    assert energies.diagonal().tolist() == sorted(energies.diagonal().tolist(), reverse=True)
    assert float(energies[5, 5]) == pytest.approx(0, abs=1e-12)  # one direction is never used
    for seed in range(20):  # no other three directions hold more of the tokens
        others = torch.linalg.qr(random(6, 3, seed=seed).double()).Q
        assert float((tokens @ others).square().sum()) <= float((tokens @ directions[:, :3]).square().sum())


def test_directions_of_nothing_are_directions_all_the_same() -> None:
    directions = principal_directions(torch.zeros(4, 4))
    torch.testing.assert_close(directions.T @ directions, torch.eye(4).double())


def test_unit_tokens_have_a_mean_square_of_one_however_long_they_were() -> None:
    tokens = torch.stack([random(8), 1e4 * random(8, seed=1), 1e-4 * random(8, seed=2)])[None]
    scaled = unit(tokens.to(torch.bfloat16))
    assert scaled.dtype == torch.float32
    for row, before in zip(scaled[0].double(), tokens[0].to(torch.bfloat16).double(), strict=True):
        assert float((row * row).mean()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(row / row.norm(), before / before.norm(), rtol=1e-5, atol=1e-6)
    assert not unit(torch.zeros(2, 8)).any()
