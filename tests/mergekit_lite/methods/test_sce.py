import merge_definitions_masks as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.sce import sce


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.29, 0.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, share, count):
    base, models = tensors(count, shape, dtype)
    expected = definition.sce(*as_lists(base, models), select_topk=share)
    agrees(sce(base, models, select_topk=share), expected, dtype, shape)


def test_one_model_and_all_elements_is_the_model(tensors):
    base, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(sce(base, [model]), model)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_models_equal_to_the_base_change_nothing(tensors, share):
    base, _ = tensors(0, dtype=torch.bfloat16)
    assert torch.equal(sce(base, [base.clone() for _ in range(3)], select_topk=share), base)


def test_the_share_is_of_the_elements_that_differ(piece):
    # 60 of 100 differ, however little, though thirds of sevens and tenths are not exact
    first = torch.full((100,), 0.7)
    second = first.clone()
    second[20:80] += torch.linspace(1e-5, 1.0, 60)
    merged = sce(torch.zeros(100), [first, first.clone(), second], select_topk=0.5)
    assert merged.nonzero().view(-1).tolist() == list(range(50, 80))


def test_the_order_of_models_does_not_matter(tensors):
    base, models = tensors(3)
    merged, turned = (sce(base, each, select_topk=0.5) for each in (models, models[::-1]))
    torch.testing.assert_close(turned, merged)


@pytest.mark.parametrize("scale", [1e-3, 1e-12, 1e-25])
def test_small_task_vectors_are_weighed_as_large_ones(tensors, scale):
    # mergekit weighs them equally where their mean squares sum to less than 1e-6; squares of 1e-25 are 0 in float32
    _, (a, b) = tensors(2, spread=1.0)
    zero = torch.zeros_like(a)
    torch.testing.assert_close(
        sce(zero, [a * scale, 10 * b * scale]) / scale, sce(zero, [a, 10 * b]), rtol=1e-5, atol=1e-5
    )


def test_strided_tensors(tensors):
    base, models = tensors(2)
    expected = sce(base.t().contiguous(), [model.t().contiguous() for model in models], select_topk=0.5)
    before = [tensor.clone() for tensor in (base, *models)]
    assert torch.equal(sce(base.t(), [model.t() for model in models], select_topk=0.5), expected)
    assert all(torch.equal(x, y) for x, y in zip(before, (base, *models), strict=True))
