import merge_definitions_masks as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties

METHODS = {"breadcrumbs": breadcrumbs, "breadcrumbs_ties": breadcrumbs_ties}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("normalize", "rescale"), [(True, False), (False, True)])
@pytest.mark.parametrize("method", METHODS)
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, normalize, rescale, method):
    base, models = tensors(3, shape, dtype)
    options = {
        "weight": [0.5, 1.25, 0.7],
        "density": [0.5, 0.29, 0.9],
        "gamma": [0.1, 0.0, 0.3],  # of the third, only a tenth has room
        "normalize": normalize,
        "rescale": rescale,
        "lambda_": 0.8,
    }
    expected = getattr(definition, method)(*as_lists(base, models), **options)
    agrees(METHODS[method](base, models, **options), expected, dtype, shape)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [1.0, -0.999], [0.0, 2.0]])
@pytest.mark.parametrize("method", METHODS)
def test_definition_with_opposite_and_zero_weights(tensors, agrees, as_lists, weight, method):
    base, models = tensors(2)
    options = {"weight": weight, "density": [0.5, 0.6], "gamma": [0.1, 0.2]}
    expected = getattr(definition, method)(*as_lists(base, models), **options)
    agrees(METHODS[method](base, models, **options), expected, base.dtype, base.shape)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.001, 1), (0.29, 29), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_the_density_is_honoured_and_the_outliers_are_the_largest(density, kept, gamma, piece):
    vector = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float() + 1
    merged = breadcrumbs(torch.zeros(100), [vector], weight=[1.0], density=[density], gamma=[gamma])
    largest = 100 - min(round(100 * gamma), 100 - kept)
    assert merged[merged != 0].sort().values.tolist() == list(range(largest - kept + 1, largest + 1))
    assert torch.equal(merged[merged != 0], vector[merged != 0])


def test_of_equal_magnitudes_the_earlier_count_as_larger(piece):
    signs = torch.tensor([1.0, -1.0]).repeat(20)
    merged = breadcrumbs(torch.zeros(40), [signs], weight=[1.0], density=[0.5], gamma=[0.25])
    assert merged.nonzero().view(-1).tolist() == list(range(10, 30))


@pytest.mark.parametrize("method", METHODS.values())
def test_limits(tensors, method):
    base, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(method(base, [model], weight=[1.0], density=[1.0], gamma=[0.3]), model)
    assert torch.equal(method(base, [model], weight=[1.0], density=[0.0], gamma=[0.3]), base)
    assert torch.equal(method(base, [base.clone()], weight=[1.0], density=[0.5], gamma=[0.1], rescale=True), base)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_element_stays(shape):
    merged = breadcrumbs(torch.zeros(shape), [torch.ones(shape)], weight=[1.0], density=[0.5], gamma=[0.9])
    assert merged.item() == 1.0


def test_rescaling_keeps_the_l1_norm(tensors):
    base, (model,) = tensors(1)
    merged = breadcrumbs(base, [model], weight=[1.0], density=[0.4], gamma=[0.05], rescale=True)
    torch.testing.assert_close((merged - base).abs().sum(), (model - base).abs().sum())


@pytest.mark.parametrize("method", METHODS.values())
def test_strided_tensors(tensors, method):
    base, models = tensors(2)
    options = {"weight": [1.0, 0.5], "density": [0.5, 0.5], "gamma": [0.1, 0.1]}
    expected = method(base.t().contiguous(), [model.t().contiguous() for model in models], **options)
    before = [tensor.clone() for tensor in (base, *models)]
    assert torch.equal(method(base.t(), [model.t() for model in models], **options), expected)
    assert all(torch.equal(x, y) for x, y in zip(before, (base, *models), strict=True))
