import merge_definitions as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.task_arithmetic import task_arithmetic


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
