import merge_definitions_masks as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.ram import ram, ramplus_tl

METHODS = {"ram": ram, "ramplus_tl": ramplus_tl}


@pytest.fixture
def sparse(tensors):
    """Models that changed about half of the base's elements each, and some of them hardly."""

    def make(count, shape=(13, 17), dtype=torch.float32):
        base, models = tensors(count, shape, dtype)
        generator = torch.Generator().manual_seed(1)
        for model in models:
            is_left = torch.rand(shape, generator=generator) < 0.5
            model.copy_(torch.where(is_left, base, model))
        return base, models

    return make


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_definition(sparse, agrees, as_lists, piece, shape, dtype, epsilon, count, method):
    base, models = sparse(count, shape, dtype)
    expected = getattr(definition, method)(*as_lists(base, models), epsilon=epsilon)
    agrees(METHODS[method](base, models, epsilon=epsilon), expected, dtype, shape)


@pytest.mark.parametrize(("r", "alpha"), [(0.5, 10.0), (-0.5, 0.3), (2.0, 0.0)])
def test_definition_of_the_boost(sparse, agrees, as_lists, piece, r, alpha):
    base, models = sparse(3)
    expected = definition.ramplus_tl(*as_lists(base, models), r=r, alpha=alpha)
    agrees(ramplus_tl(base, models, r=r, alpha=alpha), expected, base.dtype, base.shape)


def test_by_hand():
    # model 1 shares one element for two of its own, model 2 one for one
    base, one, two = torch.zeros(5), torch.tensor([1.0, 2, 4, 0, 0]), torch.tensor([0.0, 0, 2, 8, 0])
    assert ram(base, [one, two]).tolist() == [1, 2, 3, 8, 0]
    assert ramplus_tl(base, [one, two], r=1.0, alpha=1.0).tolist() == [1.5, 3, 3, 16, 0]
    assert ramplus_tl(base, [one, two], r=1.0, alpha=0.25).tolist() == [1.25, 2.5, 3, 10, 0]


@pytest.mark.parametrize("method", METHODS.values())
def test_limits(tensors, method):
    base, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(method(base, [model], epsilon=0.0), model)
    assert torch.equal(method(base, [base.clone(), base.clone()]), base)
    assert torch.equal(method(base, [model], epsilon=100.0), base)


@pytest.mark.parametrize("method", METHODS.values())
def test_the_order_of_models_does_not_matter(sparse, method):
    base, models = sparse(3)
    torch.testing.assert_close(method(base, models[::-1]), method(base, models))


@pytest.mark.parametrize("method", METHODS.values())
def test_strided_tensors(sparse, method):
    base, models = sparse(2)
    expected = method(base.t().contiguous(), [model.t().contiguous() for model in models])
    before = [tensor.clone() for tensor in (base, *models)]
    assert torch.equal(method(base.t(), [model.t() for model in models]), expected)
    assert all(torch.equal(x, y) for x, y in zip(before, (base, *models), strict=True))
