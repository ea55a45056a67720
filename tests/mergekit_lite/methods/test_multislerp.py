import itertools

import merge_definitions_arcs as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.multislerp import multislerp
from mergekit_lite.methods.nuslerp import nuslerp


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("based", [True, False])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, based):
    base, models = tensors(3, shape, dtype, spread=1.0)
    (start,), (lists,) = as_lists(base), as_lists(models)
    for weight, normalize in ([0.5, 1.25, 0.7], True), ([0.5, -0.2, 0.7], False):
        expected = definition.multislerp(start if based else None, lists, weight=weight, normalize_weights=normalize)
        merged = multislerp(base if based else None, models, weight=weight, normalize_weights=normalize)
        agrees(merged, expected, dtype, shape)


def test_two_of_equal_weight_and_length_are_halfway_on_the_arc(tensors):
    _, (a, b) = tensors(2, spread=2.0)
    b = b * a.norm() / b.norm()
    halfway = multislerp(None, [a, b], weight=[0.2, 0.2])
    torch.testing.assert_close(halfway, nuslerp(None, [a, b], weight=[1.0, 1.0]))


def test_the_order_does_not_matter(tensors):
    base, models = tensors(3)
    weight = [0.5, 0.1, 0.9]
    merged = multislerp(base, models, weight=weight)
    for order in itertools.permutations(range(3)):
        again = multislerp(base, [models[i] for i in order], weight=[weight[i] for i in order])
        torch.testing.assert_close(again, merged, rtol=1e-6, atol=1e-6)


def test_the_length_is_the_mean_length(tensors):
    _, models = tensors(3, spread=2.0)
    merged = multislerp(None, models, weight=[1.0, 2.0, 3.0])
    expected = sum(w * model.norm() for w, model in zip([1.0, 2.0, 3.0], models, strict=True)) / 6.0
    torch.testing.assert_close(merged.norm(), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_models_equal_to_the_base_are_the_base(tensors, count):
    base, _ = tensors(0, dtype=torch.bfloat16)
    assert torch.equal(multislerp(base, [base] * count, weight=[1.0] * count), base)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weight", [[1.0], [0.3]])
def test_one_model_is_itself(tensors, dtype, weight):
    _, (model,) = tensors(1, dtype=dtype)
    torch.testing.assert_close(multislerp(None, [model], weight=weight), model, rtol=1e-15, atol=0)


def test_opposite_directions_take_the_line():
    a = torch.randn(64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(multislerp(None, [a, -3 * a], weight=[1.0, 1.0]), -a)
    torch.testing.assert_close(multislerp(b, [b + a, b - a], weight=[1.0, 1.0], eps=0.0), b, rtol=0, atol=1e-6)
    around = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.75**0.5]), torch.tensor([-0.5, -(0.75**0.5)])]
    torch.testing.assert_close(multislerp(None, around, weight=[1.0] * 3), torch.zeros(2), rtol=0, atol=1e-6)


def test_weights_that_sum_to_0_are_left(tensors):
    base, models = tensors(2)
    left = multislerp(base, models, weight=[1.0, -1.0], normalize_weights=False)
    assert torch.equal(multislerp(base, models, weight=[1.0, -1.0]), left)
    assert torch.equal(multislerp(base, models, weight=[0.0, 0.0]), base)
