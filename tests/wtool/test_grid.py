import pytest
import quantization_definitions as definition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wtool.grid import BITS, Clip, Grid, Quantized, encode, fit

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(weight, grid, dtype=torch.float32, clip=None):
    scales, zeros = fit(weight, grid, dtype=dtype, clip=clip)
    index = grid.group_index(weight.shape[1])
    return Quantized(encode(weight, scales, zeros, index, grid), scales, zeros, index).values()


def steps(weight, grid, dtype=torch.float32):
    scales, _ = fit(weight, grid, dtype=dtype)
    return scales.float().abs()[:, grid.group_index(weight.shape[1])]


@pytest.mark.parametrize(
    ("in_features", "group_size", "index"),
    [(5, -1, [0, 0, 0, 0, 0]), (5, 2, [0, 0, 1, 1, 2]), (4, 2, [0, 0, 1, 1]), (3, 8, [0, 0, 0]), (1, 1, [0])],
)
def test_groups_are_neighbours_and_the_last_may_be_short(in_features, group_size, index):
    grid = Grid(4, group_size)
    assert grid.group_index(in_features).tolist() == index
    assert grid.groups(in_features) == index[-1] + 1
    assert fit(weights(2, in_features), grid, dtype=torch.float32)[0].shape == (2, index[-1] + 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_the_nearest(bits, symmetric):
    grid = Grid(bits, 6, symmetric)
    weight = weights(5, 16, seed=bits)
    scales, zeros = fit(weight, grid, dtype=torch.float32)
    codes = encode(weight, scales, zeros, grid.group_index(16), grid)
    for r in range(5):
        for i in range(16):
            zero = 0 if zeros is None else zeros[r, i // 6].item()
            arguments = weight[r, i].item(), scales[r, i // 6].item(), zero, grid.lowest, grid.highest
            assert codes[r, i].item() == definition.nearest(*arguments)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_weight_is_on_the_lowest_code_whatever_its_sign(bits, dtype):
    grid = Grid(bits, 8)
    weight = weights(20, 24, seed=bits)
    scales, zeros = fit(weight, grid, dtype=dtype)
    assert zeros is None and scales.dtype == dtype and {-1, 1} <= set(scales.sign().flatten().tolist())
    codes = encode(weight, scales, None, grid.group_index(24), grid)
    largest = weight.reshape(20, 3, 8).abs().argmax(dim=2, keepdim=True)
    assert (codes.reshape(20, 3, 8).gather(2, largest) == grid.lowest).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_one_sign_is_not_clipped(bits, dtype, sign, symmetric):
    weight = sign * (weights(30, 16, seed=bits).abs() + 0.01)
    grid = Grid(bits, 16, symmetric)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]  # of the scale, times codes
    slack = 0.5 + rounding * 2**bits
    assert ((values(weight, grid, dtype) - weight).abs() <= slack * steps(weight, grid, dtype)).all()


@pytest.mark.parametrize("bits", BITS)
def test_an_asymmetric_grid_has_zero_and_reaches_both_ends(bits):
    weight = weights(30, 16, seed=bits)
    weight[:, 3] = 0
    found = values(weight, Grid(bits, 16, symmetric=False))
    assert not found[:, 3].any()
    # a rounded zero moves the grid by half a step, rounding of a weight is another half
    assert ((found - weight).abs() <= 1.0001 * steps(weight, Grid(bits, 16, symmetric=False))).all()


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=9),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    dtype=st.sampled_from(TYPES),
    clip=st.sampled_from([None, Clip(), Clip(steps=1), Clip(norm=3.0)]),
)
def test_scales_can_always_be_divided_by(row, bits, symmetric, dtype, clip):
    grid = Grid(bits, 4, symmetric)
    scales, zeros = fit(torch.tensor([row]), grid, dtype=dtype, clip=clip)
    assert scales.isfinite().all() and scales.all()
    if zeros is not None:
        assert zeros.dtype == torch.int8 and zeros.min() >= grid.lowest and zeros.max() <= grid.highest


def test_zeros_stay_zeros():
    for symmetric in (True, False):
        for clip in (None, Clip()):
            assert not values(torch.zeros(2, 8), Grid(4, 4, symmetric), torch.float16, clip).any()


@pytest.mark.parametrize("norm", [2.0, 2.4, 2.5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_clip_search_takes_the_best_of_what_it_tries(bits, symmetric, norm):
    grid, clip = Grid(bits, 16, symmetric), Clip(lowest=0.4, steps=3, norm=norm)
    weight = weights(12, 16, seed=bits) ** 3  # heavy tails
    scales, zeros = fit(weight, grid, dtype=torch.float32, clip=clip)
    ratio = 0.4**0.5
    for r, row in enumerate(definition.lists(weight)):
        low, high = min(*row, 0.0), max(*row, 0.0)
        largest = max(row, key=abs)

        def cost(share, row=row, low=low, high=high, largest=largest):
            if symmetric:
                return definition.distance(row, largest / grid.lowest * share, 0, grid.lowest, grid.highest, norm)
            scale = (high - low) * share / (grid.highest - grid.lowest)
            zero = min(max(round(grid.lowest - low * share / scale), grid.lowest), grid.highest)
            return definition.distance(row, scale, zero, grid.lowest, grid.highest, norm)

        best = min((sign * ratio**i for i in range(3) for sign in ((1, -1) if symmetric else (1,))), key=cost)
        least = min(cost(best * ratio ** (i / 4)) for i in range(-3, 4))
        zero = 0 if zeros is None else zeros[r, 0].item()
        found = definition.distance(row, scales[r, 0].item(), zero, grid.lowest, grid.highest, norm)
        assert found == pytest.approx(least, rel=1e-4)


def test_a_clip_search_is_never_worse_than_the_whole_range():
    weight = weights(200, 32) ** 3
    for symmetric in (True, False):
        for bits in (2, 3, 4, 8):
            grid = Grid(bits, 32, symmetric)
            plain, clipped = (
                (values(weight, grid, clip=clip) - weight).double().abs().pow(2.5).sum(dim=1) for clip in (None, Clip())
            )
            assert (clipped <= plain * (1 + 1e-5)).all()


def test_groups_are_found_apart():
    # what a group gets does not depend on its neighbours, nor on how many are computed at a time
    weight = weights(700, 100)
    for symmetric in (True, False):
        grid = Grid(3, 32, symmetric)
        scales, zeros = fit(weight, grid, dtype=torch.bfloat16, clip=Clip())
        for group, columns in enumerate(torch.arange(100).split(32)):
            alone, its_zeros = fit(weight[:, columns], Grid(3, -1, symmetric), dtype=torch.bfloat16, clip=Clip())
            assert torch.equal(scales[:, group], alone[:, 0])
            assert zeros is None or torch.equal(zeros[:, group], its_zeros[:, 0])


def test_values_follow_the_group_index():
    codes = torch.tensor([[1, 2, 3, -4]], dtype=torch.int8)
    index = torch.tensor([1, 0, 1, 0])
    scales = torch.tensor([[0.5, -2.0]], dtype=torch.float16)
    assert Quantized(codes, scales, None, index).values().tolist() == [[-2.0, 1.0, -6.0, -2.0]]
    zeros = torch.tensor([[1, -1]], dtype=torch.int8)
    assert Quantized(codes, scales, zeros, index).values().tolist() == [[-4.0, 0.5, -8.0, -2.5]]
    assert codes.tolist() == [[1, 2, 3, -4]]
