import merge_definitions_arcs as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.nuslerp import nuslerp

MATRICES = [(5, 1), (1, 5), (13, 17)]


def columns(shape):
    return shape[-1] if shape else 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("based", [True, False])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, based):
    base, models = tensors(2, shape, dtype, spread=1.0)
    lists, (start,) = as_lists(models)[0], as_lists(base)
    for vectors in ["tensor", "rows"]:
        expected = definition.nuslerp(
            start if based else None, lists, weight=[0.3, 0.5], vectors=vectors, columns=columns(shape)
        )
        result = nuslerp(base if based else None, models, weight=[0.3, 0.5], vectors=vectors)
        agrees(result, expected, dtype, shape)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_definition_by_columns(tensors, agrees, as_lists, piece, shape, dtype):
    base, models = tensors(2, shape, dtype, spread=1.0)
    (start,), (lists,) = as_lists(base), as_lists(models)
    options = {"weight": [0.8, 0.3], "vectors": "columns"}
    expected = definition.nuslerp(start, lists, **options, columns=columns(shape))
    agrees(nuslerp(base, models, **options), expected, dtype, shape)


def test_columns_are_the_rows_of_the_transpose(tensors):
    base, models = tensors(2, (3, 4, 5))
    by_columns = nuslerp(base, models, weight=[1.0, 2.0], vectors="columns")
    by_rows = nuslerp(base.mT, [model.mT for model in models], weight=[1.0, 2.0], vectors="rows")
    torch.testing.assert_close(by_columns, by_rows.mT)
    assert by_columns.is_contiguous()


def test_mergekits_switches_read_as_there(tensors):
    base, models = tensors(2)
    merge = {
        (flatten, row_wise): nuslerp(
            base, models, weight=[1.0, 2.0], nuslerp_flatten=flatten, nuslerp_row_wise=row_wise
        )
        for flatten in (True, False)
        for row_wise in (True, False)
    }
    tensor, rows, columns = (
        nuslerp(base, models, weight=[1.0, 2.0], vectors=name) for name in ("tensor", "rows", "columns")
    )
    assert torch.equal(merge[True, True], tensor) and torch.equal(merge[True, False], tensor)
    assert torch.equal(merge[False, False], rows)
    assert torch.equal(merge[False, True], columns)


@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("dtype", TYPES)
def test_ends(tensors, dtype, vectors):
    _, (a, b) = tensors(2, dtype=dtype, spread=2.0)
    assert torch.equal(nuslerp(None, [a, b], weight=[1.0, 0.0], vectors=vectors), a)
    assert torch.equal(nuslerp(None, [a, b], weight=[0.0, 3.0], vectors=vectors), b)


def test_lengths_are_kept_halfway_between_equal_ones(tensors):
    _, (a, b) = tensors(2, spread=2.0)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    halfway = nuslerp(None, [a, b], weight=[1.0, 1.0], vectors="rows")
    torch.testing.assert_close(halfway.norm(dim=1), torch.ones(13))


def test_rows_on_a_line_beside_rows_that_are_not():
    a = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [3.0, 6.0], [-3.0, -4.0], [5.0, 6.0]])
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [2.0, 4.0], [0.0, 0.0], [2.5, 3.0]])
    torch.testing.assert_close(nuslerp(None, [a, b], weight=[1.0, 1.0], vectors="rows"), expected)
    by_columns = nuslerp(None, [a.T, b.T], weight=[1.0, 1.0], vectors="columns")
    torch.testing.assert_close(by_columns, expected.T)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 0.0]])
def test_weights_that_cancel_are_half_each(tensors, weight):
    base, models = tensors(2)
    assert torch.equal(nuslerp(base, models, weight=weight), nuslerp(base, models, weight=[1.0, 1.0]))


def test_models_equal_to_the_base_are_the_base(tensors):
    base, _ = tensors(0, dtype=torch.bfloat16)
    for vectors in ("tensor", "rows", "columns"):
        assert torch.equal(nuslerp(base, [base, base], weight=[0.3, 0.7], vectors=vectors), base)


def test_strides_do_not_matter(tensors):
    base, models = tensors(2)
    for vectors in ("tensor", "rows", "columns"):
        strided = nuslerp(
            base.T.contiguous().T, [m.T.contiguous().T for m in models], weight=[1.0, 2.0], vectors=vectors
        )
        assert torch.equal(strided, nuslerp(base, models, weight=[1.0, 2.0], vectors=vectors))
