import numba
import numpy as np
import pytest
import torch

from mergekit_lite.arithmetic import kernels
from mergekit_lite.methods.linear import between, weighted_sum
from wtool import compiled

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_every_bfloat16_is_read_as_it_is():
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    read = weighted_sum([numbers], [1.0], torch.float32).whole()
    torch.testing.assert_close(read, numbers.float(), rtol=0, atol=0, equal_nan=True)


def test_floats_are_rounded_to_bfloat16_as_torch_does():
    # all exponents, and around each number of bfloat16 the ties, what is next to them, and others
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234])
    bits = (high[:, None] + low).view(-1)
    numbers = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    rounded = weighted_sum([numbers], [1.0], torch.bfloat16).whole()
    torch.testing.assert_close(rounded, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [None, *TYPES])
@pytest.mark.parametrize("second", TYPES)
@pytest.mark.parametrize("first", TYPES)
def test_types_are_mixed(piece, first, second, dtype):
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(7, 11, generator=generator).to(kind) for kind in (first, second)]
    exact = 0.25 * models[0].double() + 0.75 * models[1].double()
    found = weighted_sum(models, [0.25, 0.75], dtype).whole()
    assert found.dtype == (dtype or torch.promote_types(first, second))
    torch.testing.assert_close(found, exact.to(found.dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_line_has_its_ends(piece, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(100, generator=generator).to(dtype) for _ in range(2))
    assert torch.equal(between(a, b, share=0.0, dtype=torch.float64).whole(), a.double())
    assert torch.equal(between(a, b, share=1.0, dtype=torch.float64).whole(), b.double())
    middle = between(a, b, share=0.5, dtype=torch.float64).whole()
    torch.testing.assert_close(middle, (a.double() + b.double()) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1023, 1024, 1025, 3000])
def test_a_scan_gathers_what_is_inside_in_its_order(size):
    numbers = np.abs(np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    numbers[::5] = np.float32(0.5)
    low, high = np.array([0.5, 0.9], np.float32), np.array([0.8, 0.9], np.float32)
    above, inside = np.empty((2, 2), np.int64)
    pools, work, none = (np.empty(shape, np.float32) for shape in ((2, size + 1), (4, kernels.BLOCK), 0))
    flags = np.ones(kernels.BLOCK, np.uint8)
    kernels.scan((np.zeros_like(numbers), numbers), 0, 1, none, low, high, above, inside, pools, work, flags)
    for i in range(2):
        assert above[i] == (numbers > high[i]).sum()
        assert pools[i, : inside[i]].tolist() == numbers[(numbers >= low[i]) & (numbers <= high[i])].tolist()


def test_where_nothing_can_be_kept_it_is_compiled_each_time(monkeypatch):
    compile_ = numba.njit

    def without_a_place(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    monkeypatch.setattr(compiled, "njit", without_a_place)
    double = compiled.compiled(lambda x: x + x)
    assert double(2) == 4 and double.nopython_signatures
