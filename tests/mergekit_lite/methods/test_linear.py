import merge_definitions as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.linear import linear


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, normalize):
    _, models = tensors(3, shape, dtype)
    weight = [0.5, 1.25, -0.3]
    (lists,) = as_lists(models)
    expected = definition.linear(lists, weight=weight, normalize=normalize)
    agrees(linear(models, weight=weight, normalize=normalize), expected, dtype, shape)


def test_one_model_is_itself(tensors):
    _, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(linear([model], weight=[0.7]), model)


def test_weight_on_one_gives_that_one(tensors):
    _, models = tensors(2, dtype=torch.bfloat16)
    assert torch.equal(linear(models, weight=[0.0, 2.0]), models[1])


def test_order_does_not_matter_much_and_inputs_stay(tensors):
    _, (a, b) = tensors(2)
    before = a.clone(), b.clone()
    torch.testing.assert_close(linear([a, b], weight=[0.2, 0.8]), linear([b, a], weight=[0.8, 0.2]))
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_is_cast_once(tensors):
    # the mean of three bfloat16 tensors as float32 is not what it would be through bfloat16
    _, models = tensors(3, dtype=torch.bfloat16)
    exact = sum(model.double() for model in models) / 3
    torch.testing.assert_close(
        linear(models, weight=[1, 1, 1], dtype=torch.float32).double(), exact, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0, -0.5, 1.5])
def test_of_two_is_computed_in_float32_whatever_the_type(tensors, dtype, share):
    _, (a, b) = tensors(2, shape=(97, 61), dtype=dtype)
    precise = torch.promote_types(dtype, torch.float32)
    merged = linear([a, b], weight=[1 - share, share])
    assert torch.equal(merged, torch.lerp(a.to(precise), b.to(precise), share).to(dtype))
    if share in (0.0, 1.0):
        assert torch.equal(merged, b if share else a)


def test_types_are_promoted(tensors):
    _, (a, b) = tensors(2)
    assert linear([a.half(), b.bfloat16()], weight=[1, 1]).dtype == torch.float32


def test_strided_inputs(tensors):
    _, (a, b) = tensors(2, shape=(8, 6))
    expected = linear([a.t().contiguous(), b.t().contiguous()], weight=[1, 2])
    assert torch.equal(linear([a.t(), b.t()], weight=[1, 2]), expected)


def test_empty_tensor():
    assert linear([torch.empty(0, 4), torch.empty(0, 4)], weight=[1, 1]).shape == (0, 4)
