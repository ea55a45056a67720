"""Tensors to merge, and the comparison of a result with a definition."""

import pytest
import torch

from mergekit_lite.arithmetic import chunks
from wtool import pieces


@pytest.fixture(params=[chunks.CHUNK, 16], ids=["one-piece", "many-pieces"])
def piece(request, monkeypatch):
    """The same results are due whether a tensor is walked in one piece or in many."""
    monkeypatch.setattr(chunks, "CHUNK", request.param)
    monkeypatch.setattr(pieces, "PIECE", request.param)
    return request.param


@pytest.fixture
def tensors():
    """Make a base and tuned models near it."""

    def make(count, shape=(13, 17), dtype=torch.float32, seed=0, spread=0.3):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(shape, generator=generator, dtype=torch.float64)
        tuned = [base + spread * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
        return base.to(dtype), [model.to(dtype) for model in tuned]

    return make


@pytest.fixture
def agrees():
    """Check a result against a definition: within float32's rounding, and one cast where the type is shorter."""

    def check(result, expected, dtype, shape):
        assert result.dtype == dtype
        assert result.shape == torch.Size(shape)
        exact = torch.tensor(expected, dtype=torch.float64).reshape(shape)
        step = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(result.double(), exact, rtol=step, atol=step)

    return check


def flat(tensor):
    return tensor.double().reshape(-1).tolist()


@pytest.fixture
def as_lists():
    """Tensors as the definitions want them: flat lists of floats."""
    return lambda *found: [flat(t) if isinstance(t, torch.Tensor) else [flat(one) for one in t] for t in found]
