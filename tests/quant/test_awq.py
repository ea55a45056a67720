import pytest
import quantization_definitions as definition
import torch
from quantization_definitions import layer

from quant.awq import SHARES, Fed, clipped, mean_share, mean_size, scales_at, search_scales
from quant.rtn import rtn
from wtool.grid import Grid

F32 = torch.float32
GRIDS = [Grid(3, 8), Grid(4, 8, symmetric=False), Grid(2, -1, symmetric=False), Grid(3, 7)]


def fed(rows, columns, grid, *, seed=0, channel=None, tokens=100):
    weight, gram = layer(rows, columns, seed=seed)
    size = gram.diagonal().sqrt() * 0.8
    return Fed(weight, gram, size, tokens, grid, F32, channel)


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("exponent", [0.0, 0.35, 0.95])
def test_scales_by_definition(exponent, duo):
    generator = torch.Generator().manual_seed(1)
    size, share = torch.rand(12, generator=generator) * 5, torch.rand(12, generator=generator)
    size[3] = 0  # a feature that was never anything but 0
    found = scales_at(size, share, exponent, duo=duo)
    expected = torch.tensor(definition.awq_scales(size.tolist(), share.tolist(), exponent, duo))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert float(found.max() * found.min()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1), (4, 20)])
def test_errors_and_shares_by_definition(shape, grid):
    matrix = fed(shape[0], shape[1], grid, seed=2)
    width, rows = grid.width(shape[1]), definition.lists(matrix.weight)
    shares = torch.tensor(definition.awq_share(rows, width))
    torch.testing.assert_close(mean_share([matrix], shape[1]), shares, rtol=1e-4, atol=1e-6)
    scales = scales_at(matrix.size, shares, 0.5, duo=False)
    expected = definition.awq_error(
        rows, definition.lists(matrix.gram), scales.tolist(), grid.lowest, grid.highest, width, grid.symmetric, F32
    )
    assert matrix.error(scales) == pytest.approx(expected, rel=2e-2, abs=1e-9)


def test_the_search_takes_the_best_of_all_it_tries():
    matrices = [fed(12, 32, Grid(3, 8), seed=3), fed(6, 32, Grid(3, 8), seed=3)]
    found = search_scales(matrices, 32)
    size, share = mean_size(matrices, 32), mean_share(matrices, 32)

    def error(exponent, duo):
        scales = scales_at(size, share, exponent, duo=duo)
        return sum(
            definition.awq_error(
                definition.lists(m.weight), definition.lists(m.gram), scales.tolist(), -4, 3, 8, True, F32
            )
            for m in matrices
        )

    errors = {(i / 10, duo): error(i / 10, duo) for i in range(10) for duo in (False, True)}
    assert found.before == pytest.approx(errors[0.0, False], rel=1e-2)
    assert found.error == pytest.approx(error(found.exponent, found.duo), rel=1e-2)
    assert found.error <= min(errors.values()) * 1.01
    assert found.error < found.before  # activations of unequal size are what it is for


def test_where_nothing_gains_all_stays():
    codes = torch.randint(-8, 8, (6, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::8] = -8
    exact = search_scales([Fed(codes, torch.eye(32), torch.rand(32), 50, Grid(4, 8), F32)], 32)
    assert exact.is_identity and torch.equal(exact.scales, torch.ones(32)) and exact.error == 0
    for weight, gram in [(torch.zeros(4, 8), torch.eye(8)), (torch.randn(4, 8), torch.zeros(8, 8))]:
        found = search_scales([Fed(weight, gram, gram.diagonal(), 50, Grid(4, 8), F32)], 8)
        assert found.is_identity


def test_features_that_share_a_channel_share_a_scale():
    """As the values of one head, which several query heads read: the mean over all that is of a channel."""
    channel = torch.tensor([0, 1, 2, 0, 1, 2])
    shared = fed(5, 6, Grid(3, 3), seed=4, channel=channel)
    size = mean_size([shared], 3)
    assert size.tolist() == pytest.approx([float(shared.size[i] + shared.size[i + 3]) / 2 for i in range(3)])
    scales = torch.tensor([0.5, 1.0, 2.0])
    own = Fed(shared.weight, shared.gram, shared.size, 100, shared.grid, F32)
    assert shared.error(scales) == own.error(scales.repeat(2))


def test_tokens_weigh_the_mean_size():
    few, many = fed(3, 8, Grid(4, 8), tokens=1, seed=5), fed(3, 8, Grid(4, 8), tokens=3, seed=6)
    torch.testing.assert_close(mean_size([few, many], 8), (few.size + 3 * many.size) / 4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 9), (2, 20)])
def test_clipping_by_definition(shape, grid):
    """In every group the error is the least of all shares'; rounding decides between shares as good."""
    weight, gram = layer(*shape, seed=7)
    # cut on both sides, an asymmetric range is even, its zero in the middle of two codes, and the last bit decides
    weight = weight if grid.symmetric else weight + 0.05
    found = clipped(weight, gram, grid, scale_dtype=F32)
    off = (found.values() - weight).double().tolist()
    width, lines = grid.width(shape[1]), definition.lists(gram)
    for r, row in enumerate(definition.lists(weight)):
        for begin in range(0, shape[1], width):
            end = min(begin + width, shape[1])
            own = definition.output_error([off[r][begin:end]], [line[begin:end] for line in lines[begin:end]])
            least = definition.awq_clipped(
                row, lines, begin, end, SHARES, grid.lowest, grid.highest, grid.symmetric, F32
            )
            assert own == pytest.approx(least, rel=2e-2, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clipping_any_rows_and_types(dtype):
    for weight in (torch.randn(257, 24).abs(), torch.zeros(3, 24), torch.full((2, 24), -0.5)):
        gram = layer(1, 24)[1]
        plain = rtn(weight.to(dtype), Grid(3, 8, symmetric=False), scale_dtype=dtype).values()
        found = clipped(weight.to(dtype), gram, Grid(3, 8, symmetric=False), scale_dtype=dtype)
        assert found.scales.dtype == dtype and found.codes.shape == weight.shape
        blocks = torch.block_diag(*(gram[i : i + 8, i : i + 8] for i in range(0, 24, 8)))
        ours, theirs = ((each - weight.to(dtype).float()) for each in (found.values(), plain))
        assert float(((ours @ blocks) * ours).sum()) <= float(((theirs @ blocks) * theirs).sum()) + 1e-9
