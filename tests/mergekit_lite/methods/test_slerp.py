import math

import merge_definitions as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.slerp import slerp


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, t):
    _, models = tensors(2, shape, dtype, spread=2.0)
    (lists,) = as_lists(models)
    agrees(slerp(models, t=t), definition.slerp(lists, t=t), dtype, shape)


@pytest.mark.parametrize("dtype", TYPES)
def test_ends_are_exact(tensors, dtype):
    _, (a, b) = tensors(2, dtype=dtype, spread=2.0)
    assert torch.equal(slerp([a, b], t=0.0), a)
    assert torch.equal(slerp([a, b], t=1.0), b)


def test_stays_on_the_circle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.1, 0.5, 0.9):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
        torch.testing.assert_close(slerp([a, b], t=t), expected)


def test_nearly_parallel_is_the_line(tensors):
    _, (a, b) = tensors(2, spread=1e-3)
    torch.testing.assert_close(slerp([a, b], t=0.3), 0.7 * a + 0.3 * b)


def test_opposite_is_the_line():
    a = torch.randn(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp([a, -a], t=0.25), 0.5 * a)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_zero_vector_is_the_line(t):
    b = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(slerp([torch.zeros(2), b], t=t), t * b)
    torch.testing.assert_close(slerp([b, torch.zeros(2)], t=t), (1 - t) * b)


def test_reversed_is_the_same_way_back(tensors):
    _, (a, b) = tensors(2, spread=2.0)
    torch.testing.assert_close(slerp([a, b], t=0.3), slerp([b, a], t=0.7))
