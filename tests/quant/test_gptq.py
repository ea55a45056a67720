import pytest
import quantization_definitions as definition
import torch
from quantization_definitions import layer

from quant.gptq import Settings, gptq, gptq_stack
from quant.rtn import rtn
from quant.stack import Fitting, Job, sweep_stack
from wtool.errors import RuntimeProblem
from wtool.grid import Clip, Grid
from wtool.statistics import factor, relative_errors

F32 = torch.float32
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 20), (2, 33)]


def by_definition(weight, gram, grid, *, damping=0.01, act_order=True, static_groups=True):
    """Values by the definition, and which rows no rounding came near a tie in, where float32 may decide otherwise."""
    gram = definition.lists(gram)
    columns = range(len(gram))
    order = sorted(columns, key=lambda i: -gram[i][i]) if act_order else list(columns)
    width = grid.width(len(gram))
    position = list(columns) if static_groups else [order.index(i) for i in columns]
    dead = [gram[i][i] == 0 for i in columns]
    values, clear = [], []
    for row in definition.lists(weight):
        row = [0.0 if gone else w for gone, w in zip(dead, row, strict=True)]
        found, ties = {}, []

        def fit(q, now, row=row, found=found):
            group = position[q] // width
            if group not in found:
                members = [w for i, w in enumerate(row if static_groups else now) if position[i] // width == group]
                found[group] = definition.full_range(members, grid.lowest, grid.highest, grid.symmetric, F32)

        def round_weight(q, w, found=found, ties=ties):
            scale, zero = found[position[q] // width]
            ties.append(abs((w / scale) % 1 - 0.5))
            return (definition.nearest(w, scale, zero, grid.lowest, grid.highest) - zero) * scale

        values.append(definition.obq(row, definition.damped(gram, damping), order, round_weight, fit))
        clear.append(min(ties) > 1e-4)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(clear)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, static_groups, act_order, symmetric):
    compared = 0
    for seed, (bits, group_size) in enumerate([(2, -1), (3, 4), (4, 8), (4, 32), (8, 7)]):
        weight, gram = layer(*shape, seed=seed)
        grid = Grid(bits, group_size, symmetric)
        options = {"act_order": act_order, "static_groups": static_groups}
        expected, clear = by_definition(weight, gram, grid, **options)
        found = gptq(weight, gram, grid, scale_dtype=F32, **options)
        step = found.quantized.scales.abs().max()
        torch.testing.assert_close(
            found.quantized.values()[clear].double(), expected[clear], rtol=1e-4, atol=1e-4 * step.item()
        )
        assert found.fallback is None and found.damping == 0.01
        compared += int(clear.sum())
    assert compared >= 4  # ties are rare


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(3, -1, symmetric=False)])
def test_uncorrelated_inputs_leave_rounding(grid):
    weight, _ = layer(6, 24)
    found = gptq(weight, torch.diag(torch.rand(24) + 1), grid, scale_dtype=torch.float16)
    plain = rtn(weight, grid, scale_dtype=torch.float16)
    assert torch.equal(found.quantized.codes, plain.codes)
    assert torch.equal(found.quantized.scales, plain.scales)
    assert torch.equal(found.quantized.group_index, plain.group_index)


@pytest.mark.parametrize(("bits", "factor"), [(4, 0.75), (3, 0.75), (2, 0.8)])
def test_outputs_are_nearer_than_those_of_rounding(bits, factor):
    ours, plain = 0.0, 0.0
    for seed in range(5):
        weight, gram = layer(64, 256, seed=seed)
        grid = Grid(bits, 64)
        found = gptq(weight, gram, grid, scale_dtype=F32).quantized.values()
        rounded = rtn(weight, grid, scale_dtype=F32).values()
        errors = relative_errors(weight, gram, [found, rounded])
        ours, plain = ours + errors[0].output, plain + errors[1].output
    assert ours < factor * plain


def test_rows_do_not_influence_one_another():
    weight, gram = layer(40, 64)
    grid = Grid(4, 32)
    together = gptq(weight, gram, grid, scale_dtype=F32).quantized
    apart = [gptq(rows, gram, grid, scale_dtype=F32).quantized for rows in weight.split([1, 16, 23])]
    codes = torch.cat([part.codes for part in apart])
    assert (together.codes != codes).float().mean() < 0.01  # where a sum in another order crosses a tie
    assert torch.equal(together.scales, torch.cat([part.scales for part in apart]))


def test_many_rows_are_as_few():
    # more rows than are worked on at a time
    weight, gram = layer(9001, 32)
    grid = Grid(4, 16, symmetric=False)
    many = gptq(weight, gram, grid, scale_dtype=F32).quantized
    few = gptq(weight[8900:], gram, grid, scale_dtype=F32).quantized
    assert many.codes.shape == (9001, 32) and many.scales.shape == (9001, 2)
    assert (many.codes[8900:] != few.codes).float().mean() < 0.01
    assert many.zeros is not None and few.zeros is not None
    assert torch.equal(many.zeros[8900:], few.zeros)


def test_scales_are_of_the_type_asked_for_and_the_codes_meant_for_them():
    # with only the last column correlated to nothing, its codes are nearest with the scales as stored
    weight, gram = layer(32, 16)
    gram[:, -1] = gram[-1, :] = 0
    gram[-1, -1] = 1
    found = gptq(weight, gram, Grid(8, -1), scale_dtype=torch.bfloat16).quantized
    assert found.scales.dtype == torch.bfloat16
    nearest = (weight[:, -1] / found.scales.float()[:, 0]).round().clamp(-128, 127)
    assert torch.equal(found.codes[:, -1].float(), nearest)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
def test_dead_columns_stand_for_zero_and_leave_the_others_alone(symmetric, static_groups):
    weight, gram = layer(8, 24)
    dead = torch.tensor([0, 7, 23])
    alive = torch.tensor([i for i in range(24) if i not in dead])
    gram[dead] = gram[:, dead] = 0
    grid = Grid(4, -1, symmetric)
    found = gptq(weight, gram, grid, scale_dtype=F32, static_groups=static_groups)
    assert found.dead == 3
    assert not found.quantized.values()[:, dead].any()
    # the damping is a share of a mean over all columns, so that the rest alone is damped a little otherwise
    share = (
        0.01 * torch.where(gram.diagonal() == 0, 1, gram.diagonal()).mean() / gram[alive][:, alive].diagonal().mean()
    )
    alone = gptq(weight[:, alive], gram[alive][:, alive], grid, scale_dtype=F32, damping=share.item())
    if symmetric:
        assert (found.quantized.codes[:, alive] != alone.quantized.codes).float().mean() < 0.02


def test_no_input_at_all_leaves_rounding():
    weight, _ = layer(4, 16)
    found = gptq(weight, torch.zeros(16, 16), Grid(4, 8), scale_dtype=F32)
    assert found.damping is None and found.fallback == "its inputs were all 0" and found.dead == 16
    assert torch.equal(found.quantized.codes, rtn(weight, Grid(4, 8), scale_dtype=F32).codes)


def test_a_matrix_that_is_not_positive_leaves_rounding():
    weight, gram = layer(4, 16)
    found = gptq(weight, gram - 2 * torch.diag(gram.diagonal()), Grid(4, 8), scale_dtype=F32)
    assert found.fallback == "its Gram matrix is not positive definite, however damped"
    assert torch.equal(found.quantized.codes, rtn(weight, Grid(4, 8), scale_dtype=F32).codes)


def test_more_damping_where_the_asked_one_is_not_enough():
    weight, gram = layer(4, 16)
    gram -= 0.05 * gram.diagonal().mean() * torch.eye(16) + gram * 0  # no longer positive definite
    smallest = torch.linalg.eigvalsh(gram.double()).min() / gram.diagonal().mean()
    assert smallest < -0.01
    found = gptq(weight, gram, Grid(4, 8), scale_dtype=F32)
    assert found.damping == 0.1 and found.fallback is None


def test_fewer_tokens_than_inputs():
    weight, gram = layer(16, 64, tokens=9)
    grid = Grid(4, 32)
    found = gptq(weight, gram, grid, scale_dtype=F32)
    assert found.damping == 0.01
    errors = relative_errors(weight, gram, [found.quantized.values(), rtn(weight, grid, scale_dtype=F32).values()])
    assert errors[0].output < 0.3 * errors[1].output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_of_any_float_type(dtype):
    weight, gram = layer(8, 32, dtype=dtype)
    expected = gptq(weight.float(), gram, Grid(4, 16), scale_dtype=F32).quantized
    before = weight.clone()
    assert torch.equal(gptq(weight, gram, Grid(4, 16), scale_dtype=F32).quantized.codes, expected.codes)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("shape", [(8, 32), (1, 32), (8, 1)])
def test_nothing_it_gets_is_changed(shape, act_order):
    weight, gram = layer(*shape)
    gram[0] = gram[:, 0] = 0
    kept = weight.clone(), gram.clone()
    for symmetric in (True, False):
        gptq(weight, gram, Grid(4, 16, symmetric), scale_dtype=F32, act_order=act_order)
    assert torch.equal(weight, kept[0]) and torch.equal(gram, kept[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_are_not_clipped(symmetric, sign):
    # GPTQModel 7.7.0 gives 0.467 for the largest weight, 1.0, of such a group
    weight = sign * torch.linspace(0.1, 1.0, 16)[None]
    _, gram = layer(1, 16)
    found = gptq(weight, gram * 0 + torch.eye(16), Grid(4, -1, symmetric), scale_dtype=F32).quantized
    torch.testing.assert_close(found.values(), weight, rtol=0, atol=found.scales.abs().item() * 0.5001)


def test_zeros_stay_zeros():
    _, gram = layer(1, 16)
    for symmetric in (True, False):
        found = gptq(torch.zeros(3, 16), gram, Grid(4, 8, symmetric), scale_dtype=torch.float16).quantized
        assert not found.values().any() and found.scales.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused(bad):
    weight, gram = layer(4, 16)
    gram[2, 5] = bad
    with pytest.raises(
        RuntimeProblem, match=f"the Gram matrix has {bad} at row 2, column 5; statistics must be finite"
    ):
        gptq(weight, gram, Grid(4, 8), scale_dtype=F32)


def test_groups_in_the_order_of_the_activations_are_told():
    weight, gram = layer(4, 20)
    found = gptq(weight, gram, Grid(4, 8), scale_dtype=F32, static_groups=False).quantized
    order = gram.diagonal().argsort(descending=True)
    assert found.group_index[order].tolist() == [i // 8 for i in range(20)]


def test_clipping_is_that_of_the_grid():
    weight, gram = layer(8, 64)
    clip = Clip(steps=5)
    found = gptq(weight, gram, Grid(3, 32), scale_dtype=F32, clip=clip).quantized
    assert torch.equal(found.scales, rtn(weight, Grid(3, 32), scale_dtype=F32, clip=clip).scales)


def test_two_runs_are_equal():
    weight, gram = layer(100, 96)
    first, second = (gptq(weight, gram, Grid(4, 32), scale_dtype=F32).quantized for _ in range(2))
    assert torch.equal(first.codes, second.codes)


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"static_groups": False}])
def test_several_matrices_are_as_each_alone(options):
    layers = [layer(12, 40, seed=seed) for seed in range(3)]
    layers[1] = (layers[1][0], torch.zeros(40, 40))
    weights, grams = zip(*layers, strict=True)
    grid = Grid(3, 16, symmetric=False)
    together = gptq_stack(weights, grams, grid, Settings(F32, **options))
    alone = [gptq(weight, gram, grid, scale_dtype=F32, **options) for weight, gram in layers]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.quantized.codes, other.quantized.codes)
        assert torch.equal(one.quantized.scales, other.quantized.scales)
        assert torch.equal(one.quantized.group_index, other.quantized.group_index)
        assert (one.damping, one.fallback, one.dead) == (other.damping, other.fallback, other.dead)


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"static_groups": False}])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stack_in_one_sweep_is_as_each_alone(symmetric, options):
    # as a GPU is given it
    jobs, alone = [], []
    grid, settings = Grid(3, 16, symmetric), Settings(F32, **options)
    for seed in range(3):
        weight, gram = layer(12, 40, seed=seed)
        order = gram.diagonal().argsort(descending=True) if settings.act_order else None
        found = factor(gram, damping=0.01, permutation=order)
        assert found is not None
        jobs.append(Job(weight, found, order))
        alone.append(gptq(weight, gram, grid, scale_dtype=F32, **options).quantized)
    for one, other in zip(sweep_stack(jobs, grid, Fitting(F32, settings.static_groups, None)), alone, strict=True):
        same = (one.codes == other.codes).float().mean()
        assert same > 0.98 and torch.equal(one.group_index, other.group_index)  # sums of a stack may differ in rounding


def moved_inputs(seed, columns=48, tokens=400):
    """Inputs before anything was quantized, what later ones are, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.7 / columns**0.5
    first = torch.randn(tokens, columns, generator=generator) @ mix
    later = first + 0.2 * first @ torch.randn(columns, columns, generator=generator) / columns**0.5
    return first, later, later.T @ later / tokens, (first - later).T @ later / tokens


def gptaq(weight, gram, cross, round_weight):
    """The paper's algorithm 1, in float64, column by column: the asymmetric term goes to the columns that are left."""
    gram, cross = gram.double(), cross.double()
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    term = (cross @ upper.T).triu(1) @ upper
    now, rounded = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for q in range(len(gram)):
        column = now[:, q].clone()
        rounded[:, q] = round_weight(column)
        now[:, q + 1 :] -= ((column - rounded[:, q]) / upper[q, q])[:, None] * upper[q, q + 1 :]
        now[:, q + 1 :] += column[:, None] * term[q, q + 1 :]
    return rounded


def test_outputs_of_before_are_what_is_aimed_at():
    """The error to the first outputs: least with the closed form, then by the paper's columns, then without."""
    grid, errors = Grid(4, -1), torch.zeros(3)
    for seed in range(4):
        weight, _ = layer(16, 48, seed=seed)
        first, later, gram, cross = moved_inputs(seed)
        plain = gptq(weight, gram, grid, scale_dtype=F32, act_order=False).quantized
        ours = gptq(weight, gram, grid, scale_dtype=F32, act_order=False, cross=cross).quantized
        scale = plain.scales[:, 0].double()
        theirs = gptaq(weight, gram, cross, lambda w, s=scale: (w / s).round().clamp(-8, 7) * s)
        for i, values in enumerate((ours.values(), theirs.float(), plain.values())):
            errors[i] += (later @ values.T - first @ weight.T).norm() / (first @ weight.T).norm()
    assert errors[0] < 0.9 * errors[1] < 0.81 * errors[2]


@pytest.mark.parametrize("act_order", [True, False])
def test_with_many_bits_it_is_least_squares_to_the_outputs_of_before(act_order):
    weight, _ = layer(5, 48)
    first, later, gram, cross = moved_inputs(0)
    options = {"scale_dtype": F32, "damping": 1e-6, "act_order": act_order}
    found = gptq(weight, gram, Grid(8, 1), cross=cross, **options).quantized
    best = torch.linalg.lstsq(later.double(), (first @ weight.T).double()).solution.T
    torch.testing.assert_close(found.values().double(), best, rtol=0, atol=0.01 * best.abs().max().item())


def test_inputs_that_did_not_move_change_nothing():
    weight, gram = layer(8, 32)
    plain = gptq(weight, gram, Grid(4, 16), scale_dtype=F32).quantized
    found = gptq(weight, gram, Grid(4, 16), scale_dtype=F32, cross=torch.zeros(32, 32)).quantized
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scales, plain.scales)
