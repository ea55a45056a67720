"""NaN in an input must reach the result, where it is found and named, whatever a method drops or compares."""

import math

import pytest
import torch

from mergekit_lite.methods.table import METHODS

ASKED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.02}, "sce": {"select_topk": 0.5}, "passthrough": {"scale": 0.7}}
NEEDED = [name for name in METHODS if not name.startswith("regmean")]  # which take matrices of text besides


def arguments(name, count):
    method, found = METHODS[name], dict(ASKED.get(name, {}))
    for key in method.per_model:
        found[key] = [0.5] * count if key in ("weight", "density") else [0.1] * count
    return found | ({"key": [1, 2][:count]} if method.is_random else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize("name", NEEDED)
def test_nan_reaches_the_result(name, where, dtype):
    method = METHODS[name]
    count = method.most or 2
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(37, 61, generator=generator).to(dtype) for _ in range(count + method.has_base)]
    tensors[where % len(tensors)][5, 7] = math.nan
    if method.has_base:
        merged = method.function(tensors[0], tensors[1:], **arguments(name, count))
    elif method.may_have_base:
        merged = method.function(None, tensors, **arguments(name, count))
    else:
        merged = method.function(tensors, **arguments(name, count))
    assert merged[5, 7].isnan()
