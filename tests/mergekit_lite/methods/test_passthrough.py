import torch

from mergekit_lite.methods.passthrough import passthrough


def test_is_the_model_itself(tensors):
    _, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(passthrough([model]), model)


def test_scales_in_float32(tensors):
    _, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(passthrough([model], scale=0.3), (model.float() * 0.3).bfloat16())


def test_changes_the_type(tensors):
    _, (model,) = tensors(1)
    assert torch.equal(passthrough([model], dtype=torch.float16), model.half())
