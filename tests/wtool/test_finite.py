import math

import pytest
import torch

from wtool import finite
from wtool.finite import first_nonfinite

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_16_bit_pattern_or_a_sample_agrees_with_torch(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = patterns.view(dtype) if dtype.itemsize == 2 else patterns.view(torch.bfloat16).to(dtype)
    for value in values[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))[:4000]]:
        assert (first_nonfinite(value) is None) == bool(value.isfinite())
    expected = int((~values.isfinite()).nonzero()[0])
    assert first_nonfinite(values) == expected
    assert first_nonfinite(values[values.isfinite()]) is None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_the_first_is_told(monkeypatch, dtype, bad):
    monkeypatch.setattr(finite, "_CHUNK", 16)
    tensor = torch.randn(7, 13).to(dtype)
    tensor.view(-1)[57] = tensor.view(-1)[80] = bad
    assert first_nonfinite(tensor) == 57


@pytest.mark.parametrize("dtype", TYPES)
def test_large_numbers_whose_sum_is_beyond_the_type(dtype):
    tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert first_nonfinite(tensor) is None
    tensor[2, 4] = -math.inf
    assert first_nonfinite(tensor) == 14


def test_what_has_none():
    assert first_nonfinite(torch.tensor([1, 2])) is None
    assert first_nonfinite(torch.empty(0)) is None
    assert first_nonfinite(torch.tensor(1.5)) is None
