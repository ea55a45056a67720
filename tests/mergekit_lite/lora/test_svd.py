"""Thin products against the singular value decomposition of torch."""

import pytest
import torch

from mergekit_lite.lora import svd

SHAPES = [(6, 9), (9, 6), (5, 5), (1, 4), (4, 1), (1, 1)]


def matrix(shape, dtype=torch.float64, rank=None, noise=0.0):
    generator = torch.Generator().manual_seed(3)
    if rank is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape)
    return left @ right.t() + noise * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_nearest_of_its_rank(shape, dtype):
    given = matrix(shape, dtype)
    u, s, v = torch.linalg.svd(given.double(), full_matrices=False)
    found = svd.exact(given)
    for rank in range(1, min(shape) + 1):
        factors = svd.project(given, found, rank)
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        torch.testing.assert_close(factors.b @ factors.a, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(factors.b.norm(dim=0), factors.a.norm(dim=1))
    torch.testing.assert_close(svd.energies(given), s.square(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.energies, s.square(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_random_projections_find_what_stands_out(shape):
    given = matrix(shape, rank=4, noise=1e-3)
    best = torch.linalg.svdvals(given)[4:].norm()
    found = svd.randomized(given, 4, key=1)
    factors = svd.project(given, found, 4)
    assert (factors.b @ factors.a - given).norm() <= 1.001 * best
    torch.testing.assert_close(found.energies, torch.linalg.svdvals(given)[:4].square(), rtol=1e-5, atol=0.0)
    again, other = svd.randomized(given, 4, key=1), svd.randomized(given, 4, key=2)
    assert torch.equal(again.vectors, found.vectors) and not torch.equal(other.vectors, found.vectors)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_of_all_directions_miss_nothing(shape):
    given = matrix(shape)
    factors = svd.project(given, svd.randomized(given, min(shape), key=1), min(shape))
    torch.testing.assert_close(factors.b @ factors.a, given, rtol=1e-5, atol=1e-5)


def test_a_matrix_of_zeros_has_factors_of_zeros():
    given = torch.zeros(3, 5)
    factors = svd.project(given, svd.exact(given), 2)
    assert factors.b.shape == (3, 2) and not (factors.b @ factors.a).any()


def test_the_rank_for_an_energy():
    squares = torch.tensor([8.0, 1.0, 0.5, 0.5])  # of 10
    ranks = {0.1: 1, 0.8: 1, 0.81: 2, 0.9: 2, 0.95: 3, 0.99: 4, 1.0: 4}
    assert {energy: svd.rank_for(squares, 10.0, energy) for energy in ranks} == ranks
    assert svd.rank_for(squares[:2], 10.0, 0.99) == 2  # of those that were looked for
    assert svd.rank_for(torch.tensor([3.0, 0.0, 0.0]), 3.0, 1.0) == 1
