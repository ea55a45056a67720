import pruning_definitions as definition
import pytest
import quantization_definitions as quantization
import torch
from quantization_definitions import layer, lists

from prune.magnitude import magnitude_mask
from prune.pattern import Sparsity
from prune.sparsegpt import sparsegpt
from prune.wanda import input_norm, wanda_mask
from wtool.errors import RuntimeProblem
from wtool.grid import Grid, fit
from wtool.statistics import relative_errors

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 20), (6, 33)]
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(pattern=(2, 4))


def by_definition(weight, gram, asked, *, damping=0.01, mask=None, quantize=None):
    """The paper's algorithm, with counts that are exact over the matrix, and whether no choice was near a tie."""
    rows, clear = len(weight), []

    def choose(begin, scores):
        width = len(scores[0])
        if mask is not None:
            kept = mask[:, begin : begin + width].tolist()
            scores = [[x if k else -1.0 for x, k in zip(*pair, strict=True)] for pair in zip(scores, kept, strict=True)]
        if asked.pattern:
            if width < asked.pattern[1]:
                return mask[:, begin : begin + width].tolist() if mask is not None else [[True] * width] * rows
            chosen = definition.by_pattern(scores, *asked.pattern)
            groups = zip(scores, chosen, strict=True)
        else:
            drop = int(asked.share * rows * (begin + width) + 1e-9) - int(asked.share * rows * begin + 1e-9)
            turned = [list(column) for column in zip(*scores, strict=True)]  # of equal ones lower columns go first
            chosen = [list(row) for row in zip(*definition.by_matrix(turned, drop), strict=True)]
            groups = [(sum(scores, []), sum(chosen, []))]
        for values, stays in groups:
            lost = [x for x, s in zip(values, stays, strict=True) if not s]
            left = [x for x, s in zip(values, stays, strict=True) if s]
            clear.append(not lost or not left or max(lost) <= 0 or min(left) > max(lost) * (1 + 1e-4))
        if mask is not None:
            chosen = [[a and b for a, b in zip(*pair, strict=True)] for pair in zip(chosen, kept, strict=True)]
        return chosen

    block = asked.pattern[1] if asked.pattern else 128
    left, chosen = definition.sparsegpt(lists(weight), lists(gram), damping, choose, block, quantize)
    return torch.tensor(left, dtype=torch.float64), torch.tensor(chosen), all(clear)


def damped_loss(weight, found, gram, damping):
    weight = weight.masked_fill(gram.diagonal() == 0, 0)  # which no output shows
    gram = torch.tensor(quantization.damped(lists(gram), damping), dtype=torch.float64)
    return quantization.output_error(lists(weight.double() - found.double()), lists(gram))


def check(weight, gram, asked, **options):
    """Compare with the definition; whether it could be compared."""
    expected, mask, clear = by_definition(weight, gram, asked, **options)
    if not clear:
        return False
    found = sparsegpt(weight, gram, asked, **options)
    assert torch.equal(found.keep, mask)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5 * weight.abs().max().item())
    assert not found.weight[~mask].any() and not torch.signbit(found.weight[~mask]).any()
    assert found.fallback is None and found.damping == 0.01 and found.quantized is None
    assert found.loss == pytest.approx(damped_loss(weight, found.weight, gram, 0.01), rel=1e-3, abs=1e-12)
    return True


@pytest.mark.parametrize("asked", [Sparsity(0.0), Sparsity(0.3), HALF, Sparsity(0.95)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition_with_a_share(shape, asked):
    assert sum(check(*layer(*shape, seed=seed), asked) for seed in range(4)) >= 3


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (2, 3), (4, 8), (5, 16)])
@pytest.mark.parametrize("shape", SHAPES)
def test_definition_with_a_pattern(shape, pattern):
    assert sum(check(*layer(*shape, seed=seed), Sparsity(pattern=pattern)) for seed in range(4)) >= 3


@pytest.mark.parametrize("asked", [Sparsity(0.6), TWO_OF_FOUR], ids=str)
def test_definition_over_several_blocks(asked):
    assert sum(check(*layer(2, 290, seed=seed), asked) for seed in range(3)) >= 2


@pytest.mark.parametrize("asked", [HALF, Sparsity(0.1), TWO_OF_FOUR], ids=str)
def test_what_was_dropped_before_stays_dropped_and_counts(asked):
    compared = 0
    for seed in range(4):
        weight, gram = layer(6, 34, seed=seed)
        mask = torch.rand(6, 34, generator=torch.Generator().manual_seed(seed)) > 0.3
        weight = weight * mask
        found = sparsegpt(weight, gram, asked, mask=mask)
        assert not found.weight[~mask].any() and not (found.keep & ~mask).any()
        if asked == HALF:
            assert int((~found.keep).sum()) == 102
        if asked == Sparsity(0.1):
            assert torch.equal(found.keep, mask)
        compared += check(weight, gram, asked, mask=mask)
    assert compared >= 3


@pytest.mark.parametrize("shape", [(7, 300), (64, 129), (1, 257)])
@pytest.mark.parametrize("share", [0.0, 0.123, 0.5, 0.7, 0.99])
def test_the_share_is_exact_over_the_matrix(shape, share):
    weight, gram = layer(*shape)
    for kind in (weight, weight.bfloat16(), torch.zeros_like(weight)):
        found = sparsegpt(kind, gram, Sparsity(share))
        assert int((~found.keep).sum()) == int(share * weight.numel() + 1e-6)
        assert found.weight.dtype == kind.dtype and found.weight.shape == kind.shape


def test_bfloat16_is_cast_once_at_the_end():
    weight, gram = layer(16, 64, dtype=torch.bfloat16)
    for asked in (HALF, TWO_OF_FOUR):
        found, exact = sparsegpt(weight, gram, asked), sparsegpt(weight.float(), gram, asked)
        assert torch.equal(found.keep, exact.keep) and torch.equal(found.weight, exact.weight.bfloat16())


@pytest.mark.parametrize("asked", [HALF, Sparsity(0.7), TWO_OF_FOUR, Sparsity(pattern=(4, 8))], ids=str)
def test_outputs_are_nearer_than_wandas_and_those_than_magnitudes(asked):
    errors = torch.zeros(3)
    for seed in range(6):
        weight, gram = layer(48, 192, seed=seed)
        masks = wanda_mask(weight, input_norm(gram), asked), magnitude_mask(weight, asked)
        pruned = [sparsegpt(weight, gram, asked).weight, *(weight * mask for mask in masks)]
        errors += torch.tensor([error.output for error in relative_errors(weight, gram, pruned)])
    assert errors[0] < 0.95 * errors[1] and errors[1] < 0.95 * errors[2], errors


def test_uncorrelated_inputs_leave_the_weights_as_they_are():
    weight, _ = layer(6, 24)
    found = sparsegpt(weight, torch.diag(torch.rand(24) + 1), HALF)
    assert torch.equal(found.weight, weight * found.keep)


def test_dead_inputs_are_dropped_first_and_leave_the_others_alone():
    weight, gram = layer(8, 24)
    dead = torch.tensor([0, 7, 23])
    gram[dead] = gram[:, dead] = 0
    for asked in (Sparsity(0.125), HALF, TWO_OF_FOUR):
        found = sparsegpt(weight, gram, asked)
        assert found.dead == 3 and not found.weight[:, dead].any() and found.weight.isfinite().all()
        assert check(weight, gram, asked)
    assert not sparsegpt(weight, gram, Sparsity(0.125)).keep[:, dead].any()


@pytest.mark.parametrize("grid", [None, Grid(4, 8)])
@pytest.mark.parametrize("asked", [HALF, TWO_OF_FOUR], ids=str)
def test_wanda_takes_over_where_there_is_nothing_to_go_by(asked, grid):
    weight, gram = layer(8, 24, dtype=torch.bfloat16)
    broken = gram - 40 * gram.diagonal().mean() * torch.ones(24, 24) / 24
    broken.diagonal().copy_(gram.diagonal())
    for given, told in ((torch.zeros(24, 24), "its inputs were all 0"), (broken, "is not positive definite")):
        found = sparsegpt(weight, given, asked, grid=grid)
        assert told in (found.fallback or "") and found.damping is None and found.loss is None
        assert torch.equal(found.keep, wanda_mask(weight, input_norm(given), asked))
        if grid is None:
            assert torch.equal(found.weight, weight * found.keep)
        assert not found.weight[~found.keep].any() and found.weight.dtype == torch.bfloat16
        mask = torch.rand(8, 24, generator=torch.Generator().manual_seed(0)) > 0.25
        assert not (sparsegpt(weight, given, asked, mask=mask, grid=grid).keep & ~mask).any()


def test_more_damping_where_the_asked_one_is_not_enough():
    weight, gram = layer(4, 40, tokens=8)
    found = sparsegpt(weight, gram, HALF, damping=0.0)
    assert found.fallback is None and found.damping in (1e-3, 1e-2)


def test_statistics_that_are_not_finite():
    weight, gram = layer(4, 8)
    gram[2, 3] = torch.nan
    with pytest.raises(RuntimeProblem, match="row 2, column 3"):
        sparsegpt(weight, gram, HALF)


def test_nothing_is_written_to():
    weight, gram = layer(8, 24)
    before = weight.clone(), gram.clone()
    sparsegpt(weight, gram, HALF), sparsegpt(weight, gram, TWO_OF_FOUR, grid=Grid(4, -1))
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("asked", [HALF, TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 20), (2, 33)])
def test_rounding_in_the_same_sweep_is_as_defined(shape, asked, symmetric):
    compared = 0
    for seed, (bits, size) in enumerate([(2, -1), (3, 8), (4, 32), (8, 7)]):
        weight, gram = layer(*shape, seed=seed)
        grid = Grid(bits, size, symmetric)
        scales, zeros = fit(weight, grid, dtype=torch.float16)
        ties = []

        def rounded(row, column, value, scales=scales, zeros=zeros, grid=grid, ties=ties):
            group = column // grid.width(shape[1])
            scale, zero = scales[row, group].item(), 0 if zeros is None else int(zeros[row, group])
            ties.append(abs((value / scale) % 1 - 0.5))
            return (quantization.nearest(value, scale, zero, grid.lowest, grid.highest) - zero) * scale

        expected, mask, clear = by_definition(weight, gram, asked, quantize=rounded)
        if not clear or min(ties, default=1) < 1e-3:
            continue
        found = sparsegpt(weight, gram, asked, grid=grid, scale_dtype=torch.float16)
        assert torch.equal(found.keep, mask) and found.quantized is not None
        torch.testing.assert_close(found.weight.double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(found.weight, found.quantized.values())
        assert torch.equal(found.quantized.scales, scales) and found.quantized.codes.dtype == torch.int8
        assert found.loss == pytest.approx(damped_loss(weight, found.weight, gram, 0.01), rel=1e-3, abs=1e-12)
        compared += 1
    assert compared >= 2


def test_rounding_in_the_same_sweep_is_better_than_after_it():
    joint, apart = 0.0, 0.0
    for seed in range(4):
        weight, gram = layer(32, 128, seed=seed)
        grid = Grid(3, 32)
        pruned = sparsegpt(weight, gram, HALF)
        scales, _ = fit(pruned.weight, grid, dtype=torch.float32)
        steps = scales[:, grid.group_index(128)]
        after = (pruned.weight / steps).round().clamp(grid.lowest, grid.highest) * steps
        found = sparsegpt(weight, gram, HALF, grid=grid)
        assert not found.weight[~found.keep].any()
        errors = relative_errors(weight, gram, [found.weight, after])
        joint, apart = joint + errors[0].output, apart + errors[1].output
    assert joint < 0.95 * apart
