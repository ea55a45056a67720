import merge_definitions_arcs as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.methods.nearswap import nearswap


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.1, 100.0])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, t):
    base, models = tensors(1, shape, dtype)
    agrees(nearswap(base, models, t=t), definition.nearswap(*as_lists(base, models), t=t), dtype, shape)


@pytest.mark.parametrize("dtype", TYPES)
def test_ends_are_exact(tensors, dtype):
    base, (model,) = tensors(1, dtype=dtype)
    assert torch.equal(nearswap(base, [model], t=0.0), base)
    assert torch.equal(nearswap(base, [model], t=1e30), model)


def test_what_is_near_is_swapped_and_nothing_moves_farther(tensors):
    base, (model,) = tensors(1, dtype=torch.float64)
    merged = nearswap(base, [model], t=0.1)
    near = (model - base).abs() <= 0.1
    assert torch.equal(merged[near], model[near])
    assert 0 < near.sum() < near.numel()
    torch.testing.assert_close((merged - base)[~near].abs(), torch.full_like(base[~near], 0.1))
    assert torch.equal((merged - base).sign(), (model - base).sign())


def test_inputs_stay_and_strides_do_not_matter(tensors):
    base, (model,) = tensors(1)
    before = base.clone(), model.clone()
    merged = nearswap(base, [model], t=0.1)
    assert torch.equal(base, before[0]) and torch.equal(model, before[1])
    assert torch.equal(nearswap(base.T, [model.T.contiguous()], t=0.1), merged.T)
