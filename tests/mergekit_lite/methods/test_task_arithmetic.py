import merge_definitions as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.task_arithmetic import task_arithmetic


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, normalize):
    base, models = tensors(3, shape, dtype)
    settings = {"weight": [0.5, 1.25, -0.3], "normalize": normalize, "lambda_": 0.8}
    expected = definition.task_arithmetic(*as_lists(base, models), **settings)
    agrees(task_arithmetic(base, models, **settings), expected, dtype, shape)


def test_weight_one_is_the_model_and_zero_the_base(tensors):
    base, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(task_arithmetic(base, [model], weight=[1.0]), model)
    assert torch.equal(task_arithmetic(base, [model], weight=[0.0]), base)


def test_negating_undoes_adding(tensors):
    base, (model,) = tensors(1)
    added = task_arithmetic(base, [model], weight=[1.0])
    removed = task_arithmetic(added, [added - base + added], weight=[-1.0])
    torch.testing.assert_close(removed, base)


def test_weights_that_cancel_do_not_blow_up(tensors):
    base, models = tensors(2)
    merged = task_arithmetic(base, models, weight=[1.0, -1.0], normalize=True)
    torch.testing.assert_close(merged, base + models[0] - models[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "weight", [[0.0], [1.0], [1 / 3], [1e-9], [0.5, 0.5], [0.7, 0.2, 0.1], [0.1] * 9, [0.5, 0.9], [1.0, -1.0]], ids=str
)
def test_models_equal_to_the_base_give_the_base_whatever_its_numbers(dtype, weight):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    base = numbers[numbers.isfinite()]  # all there are
    assert torch.equal(task_arithmetic(base, [base.clone() for _ in weight], weight=weight), base)


@pytest.mark.parametrize("weight", [[0.3, 0.3], [0.5, 0.5], [0.7, 0.2, 0.1], [0.4, 0.0, 0.2]], ids=str)
def test_a_mean_with_the_base_is_rounded_once(tensors, weight):
    base, models = tensors(len(weight), (999,), torch.bfloat16)
    exact = base.double() + sum(w * (model.double() - base.double()) for w, model in zip(weight, models, strict=True))
    merged = task_arithmetic(base, models, weight=weight).double()
    largest = torch.stack([base, *models]).double().abs().amax(0)
    half_a_step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 8)
    assert ((merged - exact).abs() <= half_a_step * (1 + 1e-9) + largest * 2**-21).all()
