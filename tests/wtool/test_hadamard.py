"""Hadamard matrices by what defines them, and rotations as the matrices that they stand for."""

from functools import reduce

import pytest
import torch
from torch import Tensor

from wtool.hadamard import BLOCK, Hadamard, block_size, hadamard_factors, in_words, paley, random_turn

UNKNOWN = {92, 116, 156, 172, 184, 188, 232, 236}  # not by Paley's primes and squares of primes, nor by doubling


def product(factors: tuple[Tensor, ...]) -> Tensor:
    return reduce(torch.kron, factors)


def matrix(size: int, seed: int = 0) -> Tensor:
    """Q, from what a rotation makes of unit vectors."""
    return random_turn(size, seed)(torch.eye(size).double())


@pytest.mark.parametrize("size", [1, 2, *range(4, 257, 4), 576, 896, 960, 1536])
def test_every_size_that_can_be_built_has_entries_of_one_size_and_orthogonal_rows(size: int) -> None:
    factors = hadamard_factors(size)
    assert (factors is None) == (size in UNKNOWN)
    if factors is None:
        return
    found = product(factors)
    assert found.shape == (size, size) and {*found.unique().tolist()} <= {-1.0, 1.0}
    assert torch.equal(found @ found.T, size * torch.eye(size).double())


@pytest.mark.parametrize("size", [3, 5, 6, 7, 9, 10, 18, 30, 50, 99, 250])
def test_there_is_no_hadamard_matrix_of_other_sizes(size: int) -> None:
    assert hadamard_factors(size) is None and paley(size) is None


@pytest.mark.parametrize("size", [2560, 3072, 3584, 4096, 5120, 6144, 6656, 7168, 8192, 11008, 14336, 16384, 28672])
def test_widths_of_models_have_small_factors(size: int) -> None:
    factors = hadamard_factors(size)
    assert (factors is None) == (size == 11008)
    for factor in factors or ():
        assert len(factor) <= 128
        assert torch.equal(factor @ factor.T, len(factor) * torch.eye(len(factor)).double())
    assert not factors or torch.prod(torch.tensor([len(factor) for factor in factors])) == size


@pytest.mark.parametrize("size", [1, 2, 12, 24, 64, 576, 172, 7, 384])
def test_a_rotation_is_orthogonal_and_the_same_for_a_seed(size: int) -> None:
    found = matrix(size)
    torch.testing.assert_close(found @ found.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    assert torch.equal(found, matrix(size))
    assert random_turn(size, 0).digest == random_turn(size, 0).digest
    if size > 2:
        assert not torch.equal(found, matrix(size, 1))
        assert random_turn(size, 0).digest != random_turn(size, 1).digest


@pytest.mark.parametrize("size", [12, 24, 576])
def test_factors_multiply_as_the_whole_matrix_would(size: int) -> None:
    turn = random_turn(size, 3)
    assert isinstance(turn, Hadamard)
    whole = turn.signs.diag() @ product(turn.factors) / size**0.5
    rows = torch.randn(5, size, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(turn(rows), rows @ whole)
    assert turn(rows[:0]).shape == (0, size)


def test_one_channel_is_spread_over_all_evenly() -> None:
    rows = torch.zeros(1, 576).double()
    rows[0, 17] = 24
    torch.testing.assert_close(random_turn(576, 0)(rows).abs(), torch.ones(1, 576).double())


def test_a_size_without_a_matrix_goes_in_blocks_or_by_a_random_one_and_it_is_told() -> None:
    assert block_size(576) == 576 and in_words(576) == "a Hadamard matrix of 576"
    assert block_size(11008) == 256 >= BLOCK
    assert in_words(11008) == "43 Hadamard matrices of 256 (none of 11008 is known here)"
    assert block_size(172) is None
    assert in_words(172) == "a random orthogonal matrix of 172 (no Hadamard matrix of that size is known here)"
    blocks = random_turn(11008, 0)
    rows = torch.zeros(1, 11008).double()
    rows[0, 300] = 1  # in the second block
    spread = blocks(rows)[0]
    assert int((spread != 0).sum()) == 256 and bool((spread[256:512] != 0).all())
