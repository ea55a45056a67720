import merge_definitions_masks as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.arithmetic import chunks
from mergekit_lite.arithmetic.random_mask import mask_key
from mergekit_lite.methods.della import della, della_linear
from wtool import pieces
from wtool.random_bits import RandomBits

METHODS = {"della": della, "della_linear": della_linear}
KEYS = [11, 22, 33]


def numbers_of(keys, elements):
    return [RandomBits(key).take(0, elements).tolist() for key in keys]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 40)])
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, rescale, method):
    base, models = tensors(3, shape, dtype)
    options = {
        "weight": [0.5, 1.25, 0.7],
        "density": [0.5, 0.3, 0.9],
        "epsilon": [0.2, 0.1, 0.5],  # of the third, only a tenth has room
        "rescale": rescale,
        "lambda_": 0.8,
    }
    expected = getattr(definition, method)(
        *as_lists(base, models),
        numbers=numbers_of(KEYS, base.numel()),
        columns=shape[-1] if shape else 1,
        **options,
    )
    agrees(METHODS[method](base, models, key=KEYS, **options), expected, dtype, shape)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [1.0, -0.999], [0.0, 2.0]])
def test_definition_with_opposite_and_zero_weights(tensors, agrees, as_lists, weight):
    base, models = tensors(2)
    options = {"weight": weight, "density": [0.5, 0.6], "epsilon": [0.15, 0.15]}
    numbers = numbers_of(KEYS[:2], base.numel())
    expected = definition.della_linear(*as_lists(base, models), numbers=numbers, columns=17, **options)
    agrees(della_linear(base, models, key=KEYS[:2], **options), expected, base.dtype, base.shape)


@pytest.mark.parametrize("method", METHODS.values())
def test_limits(tensors, method):
    base, (model,) = tensors(1, dtype=torch.bfloat16)
    options = {"weight": [1.0], "epsilon": [0.15], "key": [1]}
    assert torch.equal(method(base, [model], density=[1.0], **options), model)
    assert torch.equal(method(base, [model], density=[0.0], **options), base)
    assert torch.equal(method(base, [base.clone()], density=[0.5], rescale="l1", **options), base)


@pytest.mark.parametrize(
    ("density", "epsilon", "ends"),
    [(0.5, 0.15, (0.35, 0.65)), (0.9, 0.15, (0.8, 1.0)), (0.1, 0.15, (0.0, 0.2)), (0.4, 0.0, (0.4, 0.4))],
)
def test_each_rank_is_kept_as_often_as_its_probability(density, epsilon, ends):
    rows, columns = 20_000, 7
    vector = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.5
    options = {"weight": [1.0], "density": [density], "epsilon": [epsilon], "rescale": "none"}
    merged = della_linear(torch.zeros(rows, columns), [vector], key=[5], **options)
    by_rank = merged.gather(1, vector.argsort(dim=1)) != 0
    expected = torch.linspace(ends[0], ends[1], columns, dtype=torch.float64)
    sigma = (expected * (1 - expected) / rows).sqrt() + 1e-4
    assert ((by_rank.double().mean(0) - expected).abs() < 5 * sigma).all()


@pytest.mark.parametrize("method", METHODS.values())
def test_the_expectation_is_the_task_vector(method):
    # also where one element is far larger than the others, where scaling by norms is biased
    base, model = torch.zeros(10), torch.tensor([100.0] + [0.01] * 9)
    options = {"weight": [1.0], "density": [0.5], "epsilon": [0.3]}
    draws = torch.stack([method(base, [model], key=[key], **options) for key in range(1000)]).double()
    sigma = draws.std(0) / 1000**0.5
    assert ((draws.mean(0) - model).abs() < 5 * sigma).all()


def test_scaling_by_norms_keeps_the_norm(tensors):
    base, (model,) = tensors(1)
    merged = della(base, [model], weight=[1.0], density=[0.5], epsilon=[0.1], key=[1], rescale="l1")
    torch.testing.assert_close((merged - base).abs().sum(), (model - base).abs().sum())


@pytest.mark.parametrize("shape", [(1000,), (10, 100), (7, 33), (100, 1)])
def test_masks_do_not_depend_on_the_pieces(monkeypatch, shape):
    model = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    options = {"weight": [1.0], "density": [0.3], "epsilon": [0.2], "key": [7]}
    whole = della(torch.zeros(shape), [model], **options)
    assert 0 < (whole != 0).sum() < whole.numel()
    for size in (4, 32, 512):
        monkeypatch.setattr(chunks, "CHUNK", size)
        monkeypatch.setattr(pieces, "PIECE", size)
        assert torch.equal(della(torch.zeros(shape), [model], **options), whole)


def test_rows_of_one_model_and_masks_of_two_are_independent():
    ramp = torch.arange(1.0, 101.0).repeat(1000, 1)
    options = {"weight": [1.0], "density": [0.5], "epsilon": [0.0], "rescale": "none"}
    one, other = (
        della_linear(torch.zeros_like(ramp), [ramp], key=[mask_key(0, model, "x")], **options) != 0 for model in (0, 1)
    )
    for left, right in ((one, other), (one[:-1], one[1:])):
        assert abs((left == right).double().mean() - 0.5) < 5 * 0.5 / left.numel() ** 0.5


def test_strided_tensors(tensors):
    base, models = tensors(2)
    options = {"weight": [1.0, 0.5], "density": [0.5, 0.5], "epsilon": [0.1, 0.1], "key": KEYS[:2]}
    expected = della(base.t().contiguous(), [model.t().contiguous() for model in models], **options)
    before = [tensor.clone() for tensor in (base, *models)]
    assert torch.equal(della(base.t(), [model.t() for model in models], **options), expected)
    assert all(torch.equal(x, y) for x, y in zip(before, (base, *models), strict=True))


def test_bits_of_an_element_do_not_depend_on_where_one_begins():
    whole = RandomBits(7).take(0, 1000)
    bits = RandomBits(7)
    for begin, size in ((513, 7), (0, 3), (3, 4), (7, 1), (998, 2)):
        assert bits.take(begin, size).tolist() == whole[begin : begin + size].tolist()
