import pruning_definitions as definition
import pytest
import torch

from prune.magnitude import magnitude_mask
from prune.pattern import Sparsity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (6, 11)])
def test_definition(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    sizes = [[abs(w) for w in row] for row in weight.float().tolist()]
    for share in (0.0, 0.25, 0.9):
        expected = definition.by_matrix(sizes, int(share * weight.numel()))
        assert magnitude_mask(weight, Sparsity(share)).tolist() == expected
    assert magnitude_mask(weight, Sparsity(pattern=(2, 4))).tolist() == definition.by_pattern(sizes, 2, 4)


def test_the_count_is_exact_where_many_weights_are_equal():
    # of 2**20 weights in bfloat16, thousands lie at the threshold
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert len(weight.abs().unique()) < 5000
    for share in (0.1, 0.5, 0.7):
        assert int((~magnitude_mask(weight, Sparsity(share))).sum()) == int(share * 2**20)
    assert int((~magnitude_mask(torch.zeros(10, 10), Sparsity(0.33))).sum()) == 33


def test_one_threshold_for_all_rows():
    weight = torch.tensor([[0.1, 0.2, 0.3], [1.0, -2.0, 3.0]])
    assert magnitude_mask(weight, Sparsity(0.5)).tolist() == [[False] * 3, [True] * 3]
