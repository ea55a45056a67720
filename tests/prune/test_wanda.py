import pruning_definitions as definition
import pytest
import torch
from quantization_definitions import layer, lists

from prune.pattern import Sparsity
from prune.wanda import input_norm, wanda_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (6, 30)])
def test_definition(shape, dtype):
    weight, gram = layer(*shape, dtype=dtype)
    norm = input_norm(gram)
    scores = definition.wanda(lists(weight), lists(norm))
    for share in (0.0, 0.3, 0.5, 0.99):
        expected = definition.by_row(scores, int(share * shape[1] + 1e-9))
        assert wanda_mask(weight, norm, Sparsity(share)).tolist() == expected
    for pattern in ((2, 4), (1, 4), (4, 8)):
        expected = definition.by_pattern(scores, *pattern)
        assert wanda_mask(weight, norm, Sparsity(pattern=pattern)).tolist() == expected


def test_only_the_ratios_of_norms_count():
    weight, gram = layer(8, 32)
    norm = input_norm(gram)
    assert torch.equal(wanda_mask(weight, norm, Sparsity(0.5)), wanda_mask(weight, 64 * norm, Sparsity(0.5)))


@pytest.mark.parametrize("asked", [Sparsity(0.5), Sparsity(pattern=(2, 4))])
def test_inputs_that_were_never_seen_leave_the_magnitudes_to_decide(asked):
    weight, _ = layer(4, 16)
    mask = wanda_mask(weight, torch.zeros(16), asked)
    assert torch.equal(mask, wanda_mask(weight, torch.ones(16), asked))
    assert mask[:, :8].any() and not mask[:, 8:].all()


def test_a_dead_input_goes_first():
    weight, gram = layer(6, 10)
    norm = input_norm(gram)
    norm[3] = 0
    mask = wanda_mask(weight, norm, Sparsity(0.1))
    assert not mask[:, 3].any() and int(mask.sum()) == 54


def test_norms_from_a_gram_matrix():
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    expected = [sum(x**2 for x in column) ** 0.5 for column in inputs.double().t().tolist()]
    found = input_norm(inputs.t() @ inputs / 50) * 50**0.5
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
