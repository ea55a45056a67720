import pruning_definitions as definition
import pytest
import torch
from quantization_definitions import layer, lists

from prune.owl import even_by_shape, outlier_share, owl_shares, recentred
from prune.pattern import Sparsity
from prune.wanda import input_norm


def block(seed=0, *, tail=1.0):
    """Weights and norms of a block's linears; weights have outliers."""
    generator = torch.Generator().manual_seed(seed)
    layers = [layer(*shape, seed=seed + i, spread=0.3) for i, shape in enumerate([(6, 10), (4, 10), (1, 3)])]
    weights = [weight * torch.exp(tail * torch.randn(weight.shape, generator=generator)) for weight, _ in layers]
    return weights, [input_norm(gram) for _, gram in layers]


@pytest.mark.parametrize("times_mean", [1.0, 3.0, 5.0])
def test_outliers_are_counted_against_the_mean_of_the_block(times_mean):
    for seed in range(5):
        weights, norms = block(seed)
        pairs = [definition.wanda(lists(weight), lists(norm)) for weight, norm in zip(weights, norms, strict=True)]
        scores = [score for rows in pairs for row in rows for score in row]
        mean = sum(scores) / len(scores)
        expected = sum(score > times_mean * mean for score in scores) / len(scores)
        assert outlier_share(weights, norms, times_mean=times_mean) == expected
    assert outlier_share(*block(0, tail=2.0)) > 0


def test_a_block_without_scores_has_no_outliers():
    weights, norms = block()
    assert outlier_share(weights, [torch.zeros_like(norm) for norm in norms]) == 0
    assert outlier_share([torch.zeros(3, 4)], [torch.ones(4)]) == 0


def test_definition_where_blocks_are_equal_and_no_limit_is_met():
    outliers, share, spread = [0.02, 0.07, 0.05, 0.01], 0.7, 0.08
    scaled = [2 * spread * (x - min(outliers)) / (max(outliers) - min(outliers)) for x in outliers]
    keep = [x - sum(scaled) / 4 + 1 - share for x in scaled]  # the paper's ratios
    found = owl_shares(outliers, [100] * 4, share, spread=spread)
    assert found == pytest.approx([1 - x for x in keep], abs=1e-12)
    assert max(found) - min(found) == pytest.approx(2 * spread)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.7, 0.97, 0.995])
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.5])
def test_the_whole_has_the_sparsity_asked_for_to_a_weight_a_block(share, spread):
    outliers, parameters = [0.02, 0.07, 0.05, 0.01, 0.07], [10_007, 20_011, 5, 300_007, 1]
    found = owl_shares(outliers, parameters, share, spread=spread)
    assert all(0 <= one <= max(0.99, share) for one in found)
    assert sum(x * n for x, n in zip(found, parameters, strict=True)) == pytest.approx(share * sum(parameters))
    dropped = sum(Sparsity(x).dropped(1, n, by_row=False) for x, n in zip(found, parameters, strict=True) if x < 1)
    assert 0 <= share * sum(parameters) - dropped <= len(parameters)
    if 0.2 < share < 0.9 and spread == 0.08:  # more outliers, less pruning
        order = sorted(range(5), key=lambda i: outliers[i])
        assert [found[i] for i in order] == sorted(found, reverse=True) and found[1] == found[4]


def test_blocks_with_as_many_outliers_are_pruned_alike():
    assert owl_shares([0.1] * 3, [10, 20, 30], 0.6) == pytest.approx([0.6] * 3)
    assert owl_shares([0.0], [10], 0.6) == pytest.approx([0.6])


def test_what_a_limit_cuts_off_one_is_spread_over_the_others():
    # moved by c: min(0.9 + c, 0.99) + (0.3 + c) + (0.3 + c) = 3 * 0.7 with equal sizes gives c = 0.255
    assert recentred([0.9, 0.3, 0.3], [7, 7, 7], 0.7) == pytest.approx([0.99, 0.555, 0.555])
    assert recentred([0.5, 0.1], [1, 3], 0.05) == pytest.approx([0.2, 0.0])
    assert recentred([-3.0, 5.0], [1, 1], 0.25) == pytest.approx([0.0, 0.5])


def test_densities_in_proportion_to_the_sum_over_the_product():
    shapes, share = [(576, 576), (192, 576), (1536, 576)], 0.6
    found = even_by_shape(shapes, share)
    parameters = [rows * columns for rows, columns in shapes]
    assert sum(x * n for x, n in zip(found, parameters, strict=True)) == pytest.approx(share * sum(parameters))
    ratios = [(1 - x) * n / sum(shape) for x, n, shape in zip(found, parameters, shapes, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3) and found[1] < found[0] < found[2]


def test_a_matrix_too_small_to_be_pruned_stays_dense():
    found = even_by_shape([(1000, 1000), (2, 1000)], 0.2)
    assert found[1] == 0 and found[0] == pytest.approx(0.2 * 1.002)
    assert even_by_shape([(4, 8), (1, 3)], 0.0) == pytest.approx([0.0, 0.0])
