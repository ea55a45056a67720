"""Low-rank arithmetic against what the full matrices say."""

import pytest
import torch

from mergekit_lite.lora.space import Factors, add, core_space, cut, filled, knots
from mergekit_lite.methods.ties import ties


def updates(*ranks, out=7, columns=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(out, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, columns, generator=generator, dtype=torch.float64),
        )
        for rank in ranks
    ]


def full(update):
    """The matrix, entry by entry."""
    rows, rank, columns = update.b.shape[0], update.b.shape[1], update.a.shape[1]
    b, a = update.b.tolist(), update.a.tolist()
    return torch.tensor(
        [[sum(b[i][k] * a[k][j] for k in range(rank)) for j in range(columns)] for i in range(rows)],
        dtype=torch.float64,
    )


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def total(matrices):
    return sum(matrices[1:], matrices[0])


RANKS = [(2, 3), (1,), (4, 4, 4), (0, 2), (3, 0, 1)]
SHAPES = [(7, 11), (11, 7), (1, 5), (5, 1), (1, 1)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_and_its_cut(ranks, shape):
    given = updates(*ranks, out=shape[0], columns=shape[1])
    weight = [0.5, -2.0, 1.5][: len(given)]
    summed = add(given, weight)
    matrix = total([w * full(update) for update, w in zip(given, weight, strict=True)])
    near(full(summed), matrix)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 2, 5):
        found, error = cut(summed, rank)
        assert found.b.shape == (shape[0], rank) and found.a.shape == (rank, shape[1])
        left = torch.linalg.vector_norm(full(found) - matrix)
        near(left, torch.linalg.vector_norm(values[rank:]))  # Eckart and Young
        assert error == pytest.approx(float(left / torch.linalg.vector_norm(matrix)), abs=1e-7)


@pytest.mark.parametrize("space", [knots, core_space])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_merge_in_a_shared_space_is_the_sum(space, ranks, shape):
    given = updates(*ranks, out=shape[0], columns=shape[1])
    weight = [0.5, -2.0, 1.5][: len(given)]
    merged = space(given, lambda parts: total([w * part for part, w in zip(parts, weight, strict=True)]))
    near(full(merged), total([w * full(update) for update, w in zip(given, weight, strict=True)]))


def trimmed(parts):
    return ties(torch.zeros_like(parts[0]), parts, weight=[1.0] * len(parts), density=[0.4] * len(parts))


def test_knots_is_its_definition():
    """On full matrices: their decomposition side by side, the parts of Vᵀ merged, and back."""
    given = updates(2, 3, 1)
    u, s, v = torch.linalg.svd(torch.cat([full(update) for update in given], 1), full_matrices=False)
    u, s, v = u[:, :6], s[:6], v[:6]
    expected = u @ torch.diag(s) @ trimmed([part.contiguous() for part in v.split(11, dim=1)])
    near(full(knots(given, trimmed)), expected)


def test_core_space_is_its_definition():
    given = updates(2, 3)
    left = torch.linalg.svd(torch.cat([update.b for update in given], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([update.a for update in given], 0), full_matrices=False)[2]
    cores = [(left.t() @ full(update) @ right.t()).contiguous() for update in given]
    near(full(core_space(given, trimmed)), left @ trimmed(cores) @ right)


@pytest.mark.parametrize("space", [knots, core_space])
def test_the_order_and_the_form_of_the_factors_do_not_matter(space):
    """The result is a matter of the matrices: another factorization of one of them gives the same."""
    given = updates(2, 3)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if space is core_space:  # its bases are of the factors, so only turns that keep their lengths are free
        turn = torch.linalg.qr(turn)[0]
    other = Factors(given[1].b @ torch.linalg.inv(turn), turn @ given[1].a)
    expected = full(space(given, trimmed))
    near(full(space([given[0], other], trimmed)), expected)
    near(full(space(given[::-1], trimmed)), expected)


@pytest.mark.parametrize("space", [knots, core_space])
def test_updates_of_zeros_give_zeros(space):
    given = [Factors(torch.zeros(4, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))] * 2
    merged = filled(space(given, trimmed), 2)
    assert merged.b.shape == (4, 2) and merged.a.shape == (2, 3)
    assert not full(merged).any()
    assert cut(given[0], 1)[1] == 0.0
