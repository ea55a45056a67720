import math

import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.arithmetic.gram import cosines, gram, row_pieces
from mergekit_lite.methods.arcee_fusion import arcee_fusion
from mergekit_lite.methods.karcher import karcher
from mergekit_lite.methods.model_stock import model_stock
from mergekit_lite.methods.multislerp import multislerp
from mergekit_lite.methods.nearswap import nearswap
from mergekit_lite.methods.nuslerp import nuslerp


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_is_the_dot_products(tensors, as_lists, piece, shape, dtype):
    base, models = tensors(3, shape, dtype)
    (start,), (lists,) = as_lists(base), as_lists(models)
    deltas = [[x - b for x, b in zip(model, start, strict=True)] for model in lists]
    for found, vectors in (gram(None, models), lists), (gram(base, models), deltas):
        expected = [[math.fsum(x * y for x, y in zip(a, b, strict=True)) for b in vectors] for a in vectors]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_a_small_angle_is_seen():
    # two tunings of one model: in float32 the cosine would be 1
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(100_000, generator=generator)
    across = torch.randn(100_000, generator=generator)
    across -= base * (base @ across) / (base @ base)
    tuned = base + 1e-4 * across * base.norm() / across.norm()
    _, cosine = cosines(gram(None, [base, tuned]))
    assert cosine[0, 1].acos().item() == pytest.approx(1e-4, rel=1e-3)


def test_cosines_of_vectors_without_length_are_0():
    length, cosine = cosines(torch.tensor([[4.0, 0.0, -8.0], [0.0, 0.0, 0.0], [-8.0, 0.0, 16.0]], dtype=torch.float64))
    assert length.tolist() == [2.0, 0.0, 4.0]
    assert cosine.tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 40), (7, 5), (40, 3)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_pieces_of_rows_are_the_rows(tensors, piece, shape, kind):
    base, (model,) = tensors(1, shape)
    for pair in ([base, model], [base.T.contiguous().T, model]):
        found = [(rows, part.clone()) for rows, part in row_pieces(pair, kind)]
        assert torch.equal(torch.cat([part for _, part in found], dim=1), torch.stack(pair).to(kind))
        assert [row for rows, _ in found for row in range(rows.start, rows.stop)] == list(range(shape[0]))
        assert all(part.shape[1] * shape[1] <= max(piece, shape[1]) for _, part in found)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_tensors_without_elements_stay_so(shape):
    none = torch.empty(shape, dtype=torch.bfloat16)
    results = [
        karcher([none, none]),
        multislerp(none, [none, none], weight=[1.0, 1.0]),
        nearswap(none, [none], t=0.1),
        arcee_fusion(none, [none]),
        *(model_stock(none, [none, none], filter_wise=rows) for rows in (True, False)),
        *(nuslerp(none, [none, none], weight=[1.0, 2.0], vectors=name) for name in ("tensor", "rows", "columns")),
    ]
    assert all(result.shape == none.shape and result.dtype == none.dtype for result in results)
