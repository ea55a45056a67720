import pytest
import quantization_definitions as definition
import torch

from quant.rtn import rtn
from wtool.grid import Clip, Grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 9), (4, 20), (3, 33)])
def test_definition(shape, symmetric, dtype):
    for seed, (bits, group_size) in enumerate([(2, -1), (3, 4), (4, 8), (5, 6), (6, 32), (8, 7)]):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        grid = Grid(bits, group_size, symmetric)
        found = rtn(weight, grid, scale_dtype=dtype)
        width = grid.width(shape[1])
        codes, scales, zeros = definition.rtn(
            definition.lists(weight), grid.lowest, grid.highest, width, symmetric, dtype
        )
        assert found.scales.dtype == dtype
        torch.testing.assert_close(found.scales.double(), torch.tensor(scales, dtype=torch.float64), rtol=1e-6, atol=0)
        assert found.zeros is None if symmetric else found.zeros.tolist() == zeros
        near = (found.codes.long() - torch.tensor(codes)).abs()
        assert (
            near.max() <= 1 and near.float().mean() < 0.02
        )  # exact ties, as bf16 weights have them, and sums near them
        assert found.group_index.tolist() == [i // width for i in range(shape[1])]


def test_weights_on_the_grid_come_back_exactly():
    codes = torch.randint(-8, 8, (6, 32), generator=torch.Generator().manual_seed(0))
    codes[:, ::16] = -8  # every group has its extreme
    weight = codes * 2.0**-7
    found = rtn(weight, Grid(4, 16), scale_dtype=torch.float16)
    assert torch.equal(found.values(), weight)


def test_a_clip_search_brings_the_weights_nearer():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        plain, clipped = (rtn(weight, Grid(bits, 64), scale_dtype=torch.float32, clip=clip) for clip in (None, Clip()))
        assert (clipped.values() - weight).norm() < 0.97 * (plain.values() - weight).norm()
