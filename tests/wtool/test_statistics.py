import math
import statistics
import threading

import pytest
import quantization_definitions as definition
import torch

from wtool.errors import RuntimeProblem
from wtool.statistics import FIRST, SHORTEST, CrossGram, Gram, Moments, factor, lifts, output_squares, relative_errors


def mean_of_products(rows):
    columns = range(len(rows[0]))
    return [[math.fsum(row[i] * row[j] for row in rows) / len(rows) for j in columns] for i in columns]


def gathered(batches, features, masks=None):
    gram = Gram(features)
    for batch, mask in zip(batches, masks or [None] * len(batches), strict=True):
        gram.add(batch, mask)
    return gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("features", [1, 5, 70])
def test_gram_by_definition(features, dtype):
    generator = torch.Generator().manual_seed(features)
    batches = [torch.randn(2, tokens, features, generator=generator).to(dtype) for tokens in (1, 6, 3)]
    gram = gathered(batches, features)
    rows = [row for batch in batches for row in definition.lists(batch.reshape(-1, features))]
    expected = torch.tensor(mean_of_products(rows), dtype=torch.float64)
    assert (gram.tokens, gram.dropped) == (20, 0)
    found = gram.finish()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [64, 100, 257, 300])  # stripes that do and don't divide
def test_gram_is_symmetric_to_the_bit(features):
    found = gathered([torch.randn(50, features)], features).finish()
    assert torch.equal(found, found.t())


def test_tokens_that_are_masked_or_not_finite_do_not_count():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 4, 8, generator=generator)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1:] = False
    bad = inputs.clone()
    bad[0, 2] = math.nan  # masked anyway
    bad[1, 0, 3], bad[2, 3, 7] = math.nan, -math.inf
    gram = gathered([bad], 8, [mask])
    keep = mask.clone()
    keep[1, 0] = keep[2, 3] = False
    assert (gram.tokens, gram.dropped) == (7, 2)
    torch.testing.assert_close(gram.finish(), gathered([inputs[keep]], 8).finish())
    assert bad[1, 0, 3].isnan()  # its inputs are left alone


def lifted_by_loops(windows):
    """The rows of windows, short ones made as long as the (lower) median of their window, the first FIRST times."""
    rows = []
    for window in windows:
        squares = [math.fsum(value**2 for value in row) for row in window]
        median = statistics.median_low([square for square in squares if math.isfinite(square)] or [0.0])
        for place, (row, square) in enumerate(zip(window, squares, strict=True)):
            factor = math.sqrt(median / max(square, SHORTEST * median)) * (FIRST if place == 0 else 1)
            factor = max(1.0, factor)
            rows.append([value * factor for value in row])
    return rows


def windows_with_extremes(dtype=torch.float32, tokens=9, features=6):
    inputs = torch.randn(3, tokens, features, generator=torch.Generator().manual_seed(3))
    inputs[0, 0] *= 500  # long: left alone
    inputs[0, 3] /= 40
    inputs[1, 2] = 0  # stays 0
    inputs[1, 4] *= 1e-5  # shorter than is made up for
    inputs[2] *= 30  # a window of its own
    return inputs.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_short_tokens_are_lifted_to_the_median_of_their_window(dtype, tokens):
    inputs = windows_with_extremes(dtype, tokens=9)[:, :tokens]
    found = lifts(inputs) * inputs.reshape(-1, 6).double()
    expected = torch.tensor(lifted_by_loops(inputs.double().tolist()), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_without_windows_all_tokens_are_one():
    tokens = windows_with_extremes().flatten(0, 1)
    assert torch.equal(lifts(tokens)[1:], lifts(tokens[None])[1:])
    first = lifts(tokens[1:])  # as any other
    assert torch.equal(first[0], lifts(torch.cat([tokens[2:], tokens[1:2]]))[-1])
    assert lifts(tokens[:0]).shape == (0, 1)


def test_tokens_that_are_not_finite_are_no_part_of_the_median():
    inputs = windows_with_extremes()
    for bad in (math.nan, math.inf):
        inputs[0, 5, 1] = bad
        kept = torch.cat([inputs[0, :5], inputs[0, 6:]])
        found = lifts(inputs[:1])
        assert torch.equal(torch.cat([found[:5], found[6:]]), lifts(kept[None])) and found[5] == 1
    assert torch.equal(lifts(torch.full((1, 2, 3), math.nan)), torch.ones(2, 1))
    assert torch.equal(lifts(torch.zeros(1, 2, 3)), torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lifted_gram_is_that_of_lifted_tokens(dtype):
    inputs = windows_with_extremes(dtype)
    before = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    gram, cross, given = Gram(6, lifted=True), CrossGram(6, lifted=True), inputs.clone()
    for window, old in zip(inputs, before, strict=True):
        gram.add(window[None])
        cross.add_pair(window[None], old[None])
    assert torch.equal(inputs, given)  # they are left alone
    rows = (lifts(inputs) * inputs.reshape(-1, 6).float()).to(dtype)
    old = (lifts(inputs) * before.reshape(-1, 6).float()).to(dtype)
    expected, pairs = gathered([rows], 6).finish(), CrossGram(6)
    pairs.add_pair(rows, old)
    assert gram.tokens == len(rows)
    torch.testing.assert_close(gram.finish(), expected)
    for one, other in zip(cross.finish_both(), pairs.finish_both(), strict=True):
        torch.testing.assert_close(one, other)


def test_masked_tokens_are_no_part_of_the_median():
    inputs = windows_with_extremes()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 6:] = False
    masked, cut = Gram(6, lifted=True), Gram(6, lifted=True)
    masked.add(inputs, mask)
    cut.add(inputs[:, :6])
    torch.testing.assert_close(masked.finish(), cut.finish())


def test_a_first_token_that_is_long_is_left_alone():
    inputs = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(6))
    inputs[0, 0] *= 2 * FIRST * inputs.norm(dim=-1).max() / inputs[0, 0].norm()
    assert lifts(inputs)[0] == 1 and lifts(inputs)[1:].max() > 1


def test_how_short_a_token_was_is_nothing_to_a_lifted_gram():
    inputs = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(5))
    inputs[:, 0] /= 8
    shorter = inputs.clone()
    shorter[:, 0] /= 16
    found = [Gram(5, lifted=lifted) for lifted in (True, False) for _ in range(2)]
    for gram, given in zip(found, [inputs, shorter] * 2, strict=True):
        gram.add(given)
    lifted, again, plain, other = (gram.finish() for gram in found)
    torch.testing.assert_close(lifted, again)
    assert (plain - other).abs().max() > 1e-4


def test_no_token_gives_zeros():
    for gram in (Gram(4), gathered([torch.randn(2, 4)], 4, [torch.zeros(2, dtype=torch.bool)])):
        assert gram.tokens == 0
        assert not gram.finish().any()


def test_products_of_16_bit_floats_are_summed_up_in_32():
    # 4096 ones: in bfloat16 a sum of ones ends at 256
    gram = gathered([torch.ones(4096, 2, dtype=torch.bfloat16)] * 2, 2)
    assert gram.finish().tolist() == [[1, 1], [1, 1]]


def test_bfloat16_tokens_are_summed_up_as_exactly_as_float32_ones():
    # by whatever unit the processor multiplies: only the order of float32 sums may differ
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(700, 300, generator=generator) * 3).bfloat16() for _ in range(12)]
    exact = torch.cat(batches).double().t() @ torch.cat(batches).double() / 8400
    size = exact.diagonal().sqrt()
    for found in (gathered(batches, 300), gathered([batch.float() for batch in batches], 300)):
        assert ((found.finish() - exact).abs() / (size * size[:, None])).max() < 2e-6
    # and float16, which bfloat16 does not hold
    finer = [(batch.float() * (1 + 2**-10)).half() for batch in batches]
    found, exact = gathered(finer, 300).finish(), torch.cat(finer).double().t() @ torch.cat(finer).double() / 8400
    assert ((found - exact).abs() / (size * size[:, None])).max() < 2e-6


def test_errors_are_the_same_beside_a_thread_that_gathers():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2000, 400, generator=generator).bfloat16()
    matrix = torch.randn(256, 400, generator=generator)
    gram = gathered([tokens], 400).finish()
    alone, stop = output_squares(matrix, gram), threading.Event()

    def gather():
        while not stop.is_set():
            gathered([tokens], 400)

    beside = threading.Thread(target=gather)
    beside.start()
    try:
        for _ in range(40):
            assert torch.equal(output_squares(matrix, gram), alone)
    finally:
        stop.set()
        beside.join()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("features", [1, 70, 300])
def test_pairs_by_definition(features, dtype):
    generator = torch.Generator().manual_seed(features)
    now = [torch.randn(2, tokens, features, generator=generator).to(dtype) for tokens in (1, 700, 3)]
    before = [(each.float() + 0.1 * torch.randn(each.shape, generator=generator)).to(dtype) for each in now]
    now[1][0, 5, 0], before[1][1, 7, -1] = torch.nan, torch.inf  # a pair counts if both are finite
    gram = CrossGram(features)
    for each in zip(now, before, strict=True):
        gram.add_pair(*each)
    assert (gram.tokens, gram.dropped) == (1406, 2)
    x, y = (torch.cat([each.reshape(-1, features) for each in inputs]).double() for inputs in (now, before))
    counts = x.isfinite().all(dim=1) & y.isfinite().all(dim=1)
    x, y = x[counts], y[counts]
    found, cross = gram.finish_both()
    torch.testing.assert_close(found.double(), x.T @ x / 1406, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cross.double(), (y - x).T @ x / 1406, rtol=1e-5, atol=2e-6)


def test_a_pair_statistic_of_single_inputs_has_no_cross():
    gram = CrossGram(5)
    gram.add(torch.randn(9, 5))
    assert gram.tokens == 9
    found, cross = gram.finish_both()
    assert found.any() and cross is None


@pytest.mark.parametrize("features", [1, 63, 300, 1100])
def test_output_squares_by_definition(features):
    generator = torch.Generator().manual_seed(3)
    tokens, errors = torch.randn(500, features, generator=generator), torch.randn(7, features, generator=generator)
    found = output_squares(errors, gathered([tokens], features).finish())
    expected = (errors.double() @ tokens.double().t()).square().mean(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def positive(features, dtype=torch.float64):
    generator = torch.Generator().manual_seed(features)
    inputs = torch.randn(3 * features, features, dtype=torch.float64, generator=generator)
    inputs *= torch.exp(torch.randn(features, generator=generator))
    return (inputs.T @ inputs / len(inputs)).to(dtype)


@pytest.mark.parametrize("features", [1, 3, 40, 300])  # one block and several
@pytest.mark.parametrize("permuted", [True, False])
def test_factor_is_the_matrix_and_its_inverse_the_papers(features, permuted):
    gram = positive(features)
    order = torch.randperm(features) if permuted else None
    found = factor(gram, damping=0.01, permutation=order)
    assert found is not None and found.damping == 0.01 and not found.dead.any()
    asked = gram + 0.01 * gram.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    asked = asked if order is None else asked[order][:, order]
    torch.testing.assert_close((found.upper * found.pivots) @ found.upper.T, asked)
    assert torch.equal(found.upper, found.upper.triu()) and torch.equal(
        found.upper.diagonal(), torch.ones(features).double()
    )
    # GPTQ's algorithm 1 takes the upper Cholesky factor of the inverse
    papers = torch.linalg.cholesky(torch.linalg.inv(asked), upper=True)
    torch.testing.assert_close(torch.linalg.inv(found.upper * found.pivots.sqrt()), papers, rtol=1e-8, atol=1e-10)


def test_factor_in_float32_is_near_that_in_float64():
    gram = positive(500)
    exact, found = factor(gram, damping=0.01), factor(gram.float(), damping=0.01)
    assert exact is not None and found is not None
    torch.testing.assert_close(found.upper.double(), exact.upper, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pivots.double(), exact.pivots, rtol=1e-4, atol=0)


def test_an_input_that_is_always_zero_is_alone_in_the_factor():
    gram = positive(6)
    gram[2] = gram[:, 2] = 0
    found = factor(gram, damping=0.5)
    assert found is not None and found.dead.tolist() == [False, False, True, False, False, False]
    expected = definition.damped(definition.lists(gram), 0.5)
    torch.testing.assert_close((found.upper * found.pivots) @ found.upper.T, torch.tensor(expected).double())
    assert found.upper[2].tolist() == [0, 0, 1, 0, 0, 0] and found.upper[:, 2].tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("least", "damping", "used"),
    [
        (-0.05, 0.01, 0.1),
        (-0.5, 0.01, 1.0),
        (-0.05, 0.02, 0.2),
        (-0.0005, 0.0, 0.001),
        (-0.9, 0.3, 1.0),
        (-2.0, 0.01, None),
    ],
)
def test_damping_grows_tenfold_to_one(least, damping, used):
    # a matrix with this least eigenvalue, as a share of its diagonal's mean
    size = 8
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    values = torch.ones(size, dtype=torch.float64)
    values[0] = least
    values[1:] = (size - least) / (size - 1)
    gram = (basis * values) @ basis.T
    assert abs(gram.diagonal().mean().item() - 1) < 1e-9
    found = factor(gram, damping=damping)
    assert (found and found.damping) == (used and pytest.approx(used))


def test_more_inputs_than_tokens_can_be_factored():
    inputs = torch.randn(10, 400, generator=torch.Generator().manual_seed(0))
    found = factor(inputs.T @ inputs / 10, damping=0.01)
    assert found is not None and found.damping == 0.01 and found.upper.isfinite().all() and (found.pivots > 0).all()


def test_a_sum_that_overflows_is_not_taken_for_a_bad_value():
    gram = torch.full((3, 3), 3e38) + 0
    gram -= torch.full((3, 3), 2e38) * (1 - torch.eye(3))
    assert gram.isfinite().all() and not gram.sum().isfinite()
    factor(gram, damping=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad):
    gram = positive(5, torch.float32)
    gram[3, 1] = bad
    with pytest.raises(RuntimeProblem) as caught:
        factor(gram, damping=0.01)
    assert str(caught.value) == (
        f"the Gram matrix has {bad} at row 3, column 1; "
        "statistics must be finite: calibrate anew, in a wider float type if activations overflow"
    )


def test_nothing_it_gets_is_changed():
    gram = positive(20, torch.float32)
    before = gram.clone()
    factor(gram, damping=0.01, permutation=torch.arange(20).flip(0))
    assert torch.equal(gram, before)


def test_relative_errors_are_those_of_the_tokens():
    generator = torch.Generator().manual_seed(0)
    inputs, weight, other = (torch.randn(shape, generator=generator) for shape in ((50, 9), (4, 9), (4, 9)))
    gram = inputs.T @ inputs / 50
    found = relative_errors(
        weight.bfloat16(), gram, [weight.bfloat16().float(), torch.zeros(4, 9), weight + 0.1 * other]
    )
    assert (found[0].weight, found[0].output) == (0, 0)
    assert (found[1].weight, found[1].output) == pytest.approx((1, 1))
    expected = ((weight.bfloat16() - weight - 0.1 * other) @ inputs.T).norm() / (
        weight.bfloat16().float() @ inputs.T
    ).norm()
    assert found[2].output == pytest.approx(expected.item(), rel=1e-4)
    assert relative_errors(torch.zeros(2, 9), gram, [torch.zeros(2, 9)])[0].output == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("features", [1, 5, 70])
def test_moments_are_the_gram_matrix_s_diagonal_and_the_means_of_sizes(features, dtype):
    generator = torch.Generator().manual_seed(features)
    batches = [torch.randn(2, tokens, features, generator=generator).to(dtype) for tokens in (1, 6, 3)]
    moments = Moments(features)
    for batch in batches:
        moments.add(batch)
    rows = torch.cat([batch.reshape(-1, features) for batch in batches]).double()
    assert (moments.tokens, moments.dropped) == (20, 0)
    torch.testing.assert_close(moments.mean_square, gathered(batches, features).finish().diagonal())
    torch.testing.assert_close(moments.mean_square.double(), rows.square().mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moments.mean_absolute.double(), rows.abs().mean(0), rtol=1e-5, atol=1e-7)
    assert moments.mean_square.dtype == moments.mean_absolute.dtype == torch.float32


def test_moments_leave_out_tokens_that_are_masked_or_not_finite():
    inputs = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1:] = False
    inputs[0, 2] = math.nan  # masked anyway
    inputs[1, 0, 3], inputs[2, 3, 7] = math.nan, -math.inf
    moments, gram = Moments(8), gathered([inputs], 8, [mask])
    moments.add(inputs, mask)
    assert (moments.tokens, moments.dropped) == (gram.tokens, gram.dropped) == (7, 2)
    torch.testing.assert_close(moments.mean_square, gram.finish().diagonal())
    assert moments.mean_absolute.isfinite().all()


def test_moments_of_no_token_are_zeros_and_many_small_squares_are_not_lost():
    assert not Moments(4).mean_square.any() and not Moments(4).mean_absolute.any()
    moments = Moments(1)
    for _ in range(200):
        moments.add(torch.full((4096, 1), 3e-3, dtype=torch.bfloat16))
    value = torch.tensor(3e-3, dtype=torch.bfloat16).item()
    assert moments.mean_square.item() == pytest.approx(value**2, rel=1e-5)
    assert moments.mean_absolute.item() == pytest.approx(value, rel=1e-5)
