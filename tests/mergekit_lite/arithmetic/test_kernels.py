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


def scanned(numbers, low, high, most, room):
    """How many are above brackets and inside, in the first part and in all, and the pools."""
    brackets = np.array([low, high], np.float32)
    above, inside = np.zeros((2, len(low)), np.int64)
    pools, work = np.empty((len(low), room), np.float32), np.empty((4, kernels.BLOCK), np.float32)
    ends = np.empty((len(low), -(-numbers.size // kernels.SEGMENT)), np.int64)
    flags, none = np.ones(kernels.BLOCK, np.uint8), np.empty(0, np.float32)
    half = numbers.size // 2 // kernels.BLOCK * kernels.BLOCK
    for begin, part in ((0, numbers[:half]), (half, numbers[half:])):
        pair = np.zeros_like(part), part
        most = np.array(most)
        kernels.scan(pair, begin, 1, none, *brackets, most, above, inside, pools, ends, work, flags)
    return above, inside, pools, ends


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1023, 1024, 1025, 3000, 200_001])
def test_a_scan_gathers_what_is_inside_in_its_order(size):
    numbers = np.abs(np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    numbers[::5], numbers[3::7] = np.float32(0.5), np.nan
    low, high = [0.5, 0.9, 0.5], [0.8, 0.9, 0.5]
    above, inside, pools, ends = scanned(numbers, low, high, [size + 1] * 3, size + kernels.BLOCK + 1)
    for i in range(3):
        is_inside = (numbers >= np.float32(low[i])) & (numbers <= np.float32(high[i]))
        assert above[i] == size - (numbers <= np.float32(high[i])).sum()  # NaN is above
        assert inside[i] == is_inside.sum()
        if low[i] < high[i]:
            assert pools[i, : inside[i]].tolist() == numbers[is_inside].tolist()
        segments = range(kernels.SEGMENT, size + kernels.SEGMENT, kernels.SEGMENT)
        assert ends[i].tolist() == [is_inside[:end].sum() for end in segments]


def test_a_scan_gives_a_bracket_up_that_is_not_right():
    numbers = np.linspace(0, 1, 10_000, dtype=np.float32)
    above, inside, _, _ = scanned(numbers, [0.2, 0.0, 0.2], [0.3, 0.9, 0.2], [5000, 5000, 5000], 4000)
    assert above.tolist() == [5000] * 3  # of the first and the last so many are above, the pool of the second is full
    assert inside[1] < 4000


def test_where_nothing_can_be_kept_it_is_compiled_each_time(monkeypatch):
    compile_ = numba.njit

    def without_a_place(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    monkeypatch.setattr(compiled, "njit", without_a_place)
    double = compiled.compiled(lambda x: x + x)
    assert double(2) == 4 and double.nopython_signatures
