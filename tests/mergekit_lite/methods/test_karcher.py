import itertools

import merge_definitions_arcs as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.karcher import karcher
from mergekit_lite.methods.nuslerp import nuslerp
from wtool.errors import UsageError


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(tensors, agrees, as_lists, piece, shape, dtype):
    _, models = tensors(3, shape, dtype, spread=2.0)
    (lists,) = as_lists(models)
    for options in ({}, {"weight": [0.5, 1.5, 0.0], "max_iter": 3}, {"weight": [1.0, 2.0, 4.0], "tol": 1e-9}):
        agrees(karcher(models, **options), definition.karcher(lists, **options), dtype, shape)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_two_models_are_on_the_arc_between_them(tensors, share):
    _, (a, b) = tensors(2, spread=2.0)
    b = b * a.norm() / b.norm()
    merged = karcher([a, b], weight=[1 - share, share], max_iter=50, tol=1e-9)
    torch.testing.assert_close(merged, nuslerp(None, [a, b], weight=[1 - share, share]))


def test_no_direction_nearby_has_smaller_angles(tensors):
    _, models = tensors(4, (30,), spread=1.0)
    models = [model.double() for model in models]
    weight = [1.0, 0.5, 2.0, 0.25]

    def cost(point):
        angles = [torch.cosine_similarity(point, model, dim=0).acos().item() for model in models]
        return sum(w * angle**2 for w, angle in zip(weight, angles, strict=True))

    merged = karcher(models, weight=weight, max_iter=100, tol=1e-10)
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        moved = merged + 0.01 * merged.norm() * torch.randn(30, generator=generator, dtype=torch.float64) / 30**0.5
        assert cost(merged) < cost(moved)


def test_the_order_does_not_matter(tensors):
    _, models = tensors(3, spread=1.0)
    merged = karcher(models)
    for order in itertools.permutations(range(3)):
        torch.testing.assert_close(karcher([models[i] for i in order]), merged)


def test_lengths_do_not_turn_it(tensors):
    _, (a, b) = tensors(2, spread=2.0)
    torch.testing.assert_close(karcher([4 * a, 4 * b]), 4 * karcher([a, b]))
    longer, merged = karcher([9 * a, b]), karcher([a, b])
    torch.testing.assert_close(longer / longer.norm(), merged / merged.norm())


@pytest.mark.parametrize("dtype", TYPES)
def test_models_that_are_equal_stay(tensors, agrees, as_lists, dtype):
    _, (model,) = tensors(1, dtype=dtype)
    (lists,) = as_lists(model)
    for count in (1, 2, 5):
        agrees(karcher([model] * count), lists, dtype, model.shape)


def test_opposite_vectors_give_the_first_at_the_mean_length():
    a = torch.tensor([1.0, 2.0, 2.0])
    torch.testing.assert_close(karcher([a, -2 * a]), 1.5 * a)
    torch.testing.assert_close(karcher([torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(3.0)]), torch.tensor(2.0))


def test_zeros():
    a = torch.tensor([1.0, 2.0, 2.0])
    torch.testing.assert_close(karcher([a, torch.zeros(3)]), 0.5 * a)
    assert torch.equal(karcher([torch.zeros(3)] * 2), torch.zeros(3))


def test_weights_that_are_all_0():
    with pytest.raises(UsageError, match="karcher: the weights sum to 0"):
        karcher([torch.ones(2), torch.ones(2)], weight=[0.0, 0.0])


def test_strides_do_not_matter(tensors):
    _, models = tensors(3)
    assert torch.equal(karcher([m.T for m in models]).T, karcher([m.T.contiguous() for m in models]).T)
