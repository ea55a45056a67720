import itertools

import merge_definitions_arcs as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.model_stock import model_stock


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("filter_wise", [True, False])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, filter_wise):
    base, models = tensors(3, shape, dtype, spread=0.3)
    models = [model + 0.2 for model in models]  # so that they agree in part
    expected = definition.model_stock(
        *as_lists(base, models), filter_wise=filter_wise, columns=shape[-1] if shape else 1
    )
    agrees(model_stock(base, models, filter_wise=filter_wise), expected, dtype, shape)


def test_agreement_is_the_mean_and_right_angles_are_the_base():
    base = torch.zeros(2, 2)
    same = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(model_stock(base, [same, 2 * same]), 1.5 * same)
    across = torch.tensor([[2.0, -1.0], [-4.0, 3.0]])
    assert torch.equal(model_stock(base, [same, across], filter_wise=True), base)
    assert torch.equal(model_stock(base, [same, -same]), base)


def test_the_foot_of_the_perpendicular():
    # for equal lengths the merged model is where the line from the base to the mean is nearest to the middle of the
    # models' distribution: the paper's geometry, for 60 degrees t = 2/3
    models = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.75**0.5])]
    torch.testing.assert_close(model_stock(torch.zeros(2), models), (models[0] + models[1]) / 2 * 2 / 3)


def test_models_that_point_apart(tensors):
    base = torch.zeros(2, dtype=torch.float64)
    angle = torch.tensor(2.690565841793531, dtype=torch.float64)  # of cosine -0.9
    models = [torch.tensor([1.0, 0.0], dtype=torch.float64), torch.stack([angle.cos(), angle.sin()])]
    assert torch.equal(model_stock(base, models), base)
    torch.testing.assert_close(model_stock(base, models, clamp=False), -18 * (models[0] + models[1]) / 2)


def test_nothing_is_lost_near_the_base():
    # t is 1/101 or so: the form t mean + (1 - t) base rounds it all away in bfloat16
    generator = torch.Generator().manual_seed(0)
    base = torch.ones(4096, dtype=torch.bfloat16)
    models = [(1 + torch.randn(4096, generator=generator).abs()).bfloat16() for _ in range(2)]
    merged = model_stock(base, models)
    exact = torch.tensor(definition.model_stock(base.tolist(), [m.tolist() for m in models]), dtype=torch.float64)
    torch.testing.assert_close(merged.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("filter_wise", [True, False])
def test_models_equal_to_the_base(tensors, filter_wise):
    base, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(model_stock(base, [base, base], filter_wise=filter_wise), base)
    assert torch.equal(model_stock(base, [base, model], filter_wise=filter_wise), base)


def test_the_order_does_not_matter(tensors):
    base, models = tensors(3)
    models = [model + 0.2 for model in models]
    merged = model_stock(base, models, filter_wise=True)
    for order in itertools.permutations(range(3)):
        again = model_stock(base, [models[i] for i in order], filter_wise=True)
        torch.testing.assert_close(again, merged, rtol=1e-6, atol=1e-6)


def test_each_row_is_merged_on_its_own(tensors):
    base, models = tensors(2)
    models = [model + 0.2 for model in models]
    merged = model_stock(base, models, filter_wise=True)
    for row in range(len(base)):
        alone = model_stock(base[row], [model[row] for model in models])
        torch.testing.assert_close(merged[row], alone, rtol=1e-6, atol=1e-6)
