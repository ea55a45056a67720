import merge_definitions_arcs as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.arcee_fusion import arcee_fusion


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(tensors, agrees, as_lists, piece, shape, dtype):
    base, models = tensors(1, shape, dtype)
    expected = definition.arcee_fusion(*as_lists(base, models), columns=shape[-1] if shape else 1)
    agrees(arcee_fusion(base, models), expected, dtype, shape)


@pytest.mark.parametrize("factor", [0.0, 0.7, 3.0, 1e9])
def test_definition_with_another_threshold(tensors, agrees, as_lists, factor):
    base, models = tensors(1, (40, 50))
    expected = definition.arcee_fusion(*as_lists(base, models), columns=50, iqr_factor=factor)
    merged = arcee_fusion(base, models, iqr_factor=factor)
    agrees(merged, expected, torch.float32, (40, 50))
    share = (merged != base).double().mean().item()
    assert share >= 0.5 if factor == 0.0 else share < 0.3 if factor < 1e9 else share == 0.0


@pytest.mark.parametrize("dtype", TYPES)
def test_each_element_is_of_one_of_the_two(tensors, dtype):
    base, (model,) = tensors(1, (40, 50), dtype)
    merged = arcee_fusion(base, [model])
    taken = merged != base
    assert torch.equal(merged[taken], model[taken])
    assert 0 < taken.sum() < 0.25 * taken.numel()  # beyond the third quartile


def test_the_larger_change_of_a_row_is_taken_first(tensors):
    base, (model,) = tensors(1, (40, 50))
    merged = arcee_fusion(base, [model])
    taken, change = merged != base, (model - base).abs()
    for row in range(40):
        if taken[row].any() and not taken[row].all():
            assert change[row][taken[row]].min() > change[row][~taken[row]].max()


def test_rows_that_keep_their_shape_stay(tensors):
    # a constant added to a row does not change its softmax
    base, (model,) = tensors(1, (40, 50), torch.float64)
    model[:20] = base[:20] + 5.0
    merged = arcee_fusion(base, [model])
    assert torch.equal(merged[:20], base[:20])
    assert not torch.equal(merged[20:], base[20:])


@pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
def test_rows_of_one_element_are_the_model(tensors, shape):
    base, (model,) = tensors(1, shape)
    assert torch.equal(arcee_fusion(base, [model]), model)


def test_a_model_equal_to_the_base(tensors):
    base, _ = tensors(0, dtype=torch.bfloat16)
    assert torch.equal(arcee_fusion(base, [base.clone()]), base)


def test_strides_do_not_matter(tensors):
    base, (model,) = tensors(1, (40, 50))
    strided = arcee_fusion(base.T.contiguous().T, [model.T.contiguous().T])
    assert torch.equal(strided, arcee_fusion(base, [model]))


def test_above_a_million_elements_it_is_exact_and_the_same_each_time():
    # each row holds the cubes of 1 .. 1000 in an order of its own, so that all rows have the same divergence
    generator = torch.Generator().manual_seed(0)
    numbers = torch.stack([torch.randperm(1000, generator=generator) for _ in range(1100)]).double() + 1.0
    base = torch.zeros(1100, 1000, dtype=torch.float64)
    merged = arcee_fusion(base, [numbers**3 / 1e9])
    # 500^3 + 1.5 (750^3 - 250^3) is between 902^3 and 903^3
    assert torch.equal(merged != base, numbers >= 903)
    assert torch.equal(arcee_fusion(base, [numbers / 1e3]), base)  # 500 + 1.5 * 500 is reached by none
