import pytest
import quantization_definitions as definition
import torch
from quantization_definitions import layer

from quant.gptq import gptq
from quant.refine import added, better_rows, refine_codes, refit_scales
from quant.rtn import rtn
from wtool.grid import Grid

F32 = torch.float32


def damped(gram, damping=0.01):
    return torch.tensor(definition.damped(definition.lists(gram), damping), dtype=torch.float64)


def error(weight, quantized, gram):
    """tr(E G Eᵀ) with the damped G, by rows."""
    off = weight.double() - quantized.values().double()
    return ((off @ damped(gram)) * off).sum(dim=1)


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, -1), Grid(2, 8), Grid(3, 16, symmetric=False)])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("scale_dtype", [F32, torch.bfloat16])
def test_the_error_of_no_row_grows(grid, refit, scale_dtype):
    for start in (gptq, None):
        weight, gram = layer(24, 40, seed=grid.bits)
        gram[5] = gram[:, 5] = 0
        weight[:, 5] = 0  # as gptq takes a dead input
        now = start(weight, gram, grid, scale_dtype=scale_dtype).quantized if start else None
        now = now or rtn(weight, grid, scale_dtype=scale_dtype)
        errors = [error(weight, now, gram)]
        for _ in range(3):
            now = refit_scales(weight, gram, added(gram, 0.01), now) if refit else now
            now = refine_codes(weight, gram, added(gram, 0.01), now, grid)
            errors.append(error(weight, now, gram))
            assert (errors[-1] <= errors[-2] * (1 + 1e-4) + 1e-9).all()
            assert now.codes.min() >= grid.lowest and now.codes.max() <= grid.highest
            assert now.scales.dtype == scale_dtype and now.scales.isfinite().all() and now.scales.all()
        assert errors[-1].sum() < errors[0].sum()


@pytest.mark.parametrize("grid", [Grid(3, 3), Grid(2, -1, symmetric=False)])
def test_definition(grid):
    # every code in turn at the best of all codes
    weight, gram = layer(4, 7)
    start = rtn(weight, grid, scale_dtype=F32)
    found = refine_codes(weight, gram, added(gram, 0.01), start, grid)
    matrix = definition.lists(damped(gram))
    for r in range(4):
        scales = start.scales[r, start.group_index].tolist()
        zeros = [0] * 7 if start.zeros is None else start.zeros[r, start.group_index].tolist()
        codes = start.codes[r].tolist()
        row = definition.lists(weight[r])

        def cost(codes, row=row, scales=scales, zeros=zeros):
            off = [w - (c - z) * s for w, c, z, s in zip(row, codes, zeros, scales, strict=True)]
            return definition.output_error([off], matrix)

        for j in range(7):
            tries = [[*codes[:j], code, *codes[j + 1 :]] for code in range(grid.lowest, grid.highest + 1)]
            codes = min(tries, key=cost)
        assert found.codes[r].tolist() == codes


def test_scales_are_at_their_best_for_the_codes():
    # groups that are not correlated with one another: each scale alone is a line search
    weight, _ = layer(6, 16)
    _, block = layer(6, 8)
    gram = torch.block_diag(block, block)
    start = rtn(weight, Grid(3, 8), scale_dtype=F32)
    found = refit_scales(weight, gram, added(gram, 0.01), start)
    best = error(weight, found, gram)
    for factor in (0.999, 1.001):
        for group in range(2):
            scales = found.scales.clone()
            scales[:, group] *= factor
            moved = type(found)(found.codes, scales, None, found.group_index)
            assert (error(weight, moved, gram) > best).all()


def test_damping_by_definition():
    _, gram = layer(1, 9)
    gram[4] = gram[:, 4] = 0
    found = gram + added(gram, 0.3).diag()
    torch.testing.assert_close(found.double(), damped(gram, 0.3), rtol=1e-6, atol=0)


def test_the_better_row_of_two():
    weight, gram = layer(30, 24)
    first, second = (rtn(weight + 0.01 * torch.randn(30, 24), Grid(3, 8), scale_dtype=F32) for _ in range(2))
    found = better_rows(weight, gram, added(gram, 0.01), first, second)
    expected = torch.minimum(error(weight, first, gram), error(weight, second, gram))
    torch.testing.assert_close(error(weight, found, gram), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", [Grid(3, 16), Grid(3, 16, symmetric=False)])
@pytest.mark.parametrize("options", [{}, {"static_groups": False}, {"act_order": False}])
def test_gptq_refines_when_asked(options, grid):
    weight, gram = layer(24, 64)
    plain, codes, scales = (
        gptq(weight, gram, grid, scale_dtype=torch.bfloat16, refine=refine, refit=refit, **options).quantized
        for refine, refit in ((0, False), (3, False), (3, True))
    )
    errors = [error(weight, quantized, gram) for quantized in (plain, codes, scales)]
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all() and (errors[2] <= errors[0] * (1 + 1e-4)).all()
    assert errors[2].sum() < 0.97 * errors[1].sum() < 0.97 * errors[0].sum()
    assert torch.equal(scales.group_index, plain.group_index)
    if plain.zeros is not None:
        assert torch.equal(scales.zeros, plain.zeros)


def test_many_rows_are_refined_as_few():
    weight, gram = layer(9001, 16)
    options = {"scale_dtype": F32, "refine": 1, "refit": True}
    many = gptq(weight, gram, Grid(3, 8, symmetric=False), **options).quantized
    few = gptq(weight[8990:], gram, Grid(3, 8, symmetric=False), **options).quantized
    assert (many.codes[8990:] != few.codes).float().mean() < 0.02
