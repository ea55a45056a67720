import pruning_definitions as definition
import pytest
import torch

from prune.pattern import Sparsity
from prune.selection import keep_by_matrix, keep_by_row, keep_highest, keep_of_first, keep_of_neighbours

SHAPES = [(1, 1), (1, 9), (7, 1), (3, 8), (5, 13), (2, 40)]
KINDS = ["distinct", "few values", "zeros", "one value", "infinite"]


def scores(kind, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "few values":
        return torch.randint(0, 4, shape, generator=generator).float()
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "one value":
        return torch.full(shape, 0.1)
    values = torch.rand(shape, generator=generator)
    if kind == "infinite":
        values[values > 0.8] = torch.inf
        values[values < 0.2] = -torch.inf
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_of_every_row_as_a_stable_sort_drops(shape, kind):
    values = scores(kind, *shape)
    for drop in {0, 1, shape[1] // 2, shape[1] - 1, shape[1]}:
        assert keep_highest(values, drop).tolist() == definition.by_row(values.tolist(), drop)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.999])
def test_shares_by_row_and_by_matrix(shape, kind, share):
    values, asked = scores(kind, *shape), Sparsity(share)
    mask = keep_by_row(values, asked)
    assert mask.tolist() == definition.by_row(values.tolist(), int(share * shape[1] + 1e-9))
    assert int((~mask).sum()) == asked.dropped(*shape, by_row=True)
    mask = keep_by_matrix(values, asked)
    assert mask.tolist() == definition.by_matrix(values.tolist(), int(share * shape[0] * shape[1] + 1e-9))
    assert int((~mask).sum()) == asked.dropped(*shape, by_row=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8), (5, 9), (16, 32)])
def test_patterns_leave_the_tail(shape, kind, pattern):
    values, asked = scores(kind, *shape), Sparsity(pattern=pattern)
    expected = definition.by_pattern(values.tolist(), *pattern)
    for mask in (keep_by_row(values, asked), keep_by_matrix(values, asked), keep_of_neighbours(values, *pattern)):
        assert mask.tolist() == expected
        assert int((~mask).sum()) == asked.dropped(*shape, by_row=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4, 8, 9])
def test_along_the_first_dimension(count, kind):
    values = scores(kind, count, 3, 5)
    for kept in range(1, count):
        expected = definition.by_row(values.reshape(count, -1).t().tolist(), count - kept)
        assert keep_of_first(values, kept).reshape(count, -1).t().tolist() == expected


def test_nothing_is_written_to():
    values = scores("few values", 4, 12)
    before = values.clone()
    keep_highest(values, 6), keep_of_neighbours(values, 2, 4), keep_of_neighbours(values, 5, 9)
    assert torch.equal(values, before)


def test_a_view_is_as_good():
    values = scores("distinct", 12, 5).t()
    assert keep_highest(values, 4).tolist() == definition.by_row(values.tolist(), 4)
    assert keep_of_neighbours(values, 2, 4).tolist() == definition.by_pattern(values.tolist(), 2, 4)
    assert keep_by_matrix(values, Sparsity(0.5)).tolist() == definition.by_matrix(values.tolist(), 30)
