import pruning_definitions as definition
import pytest
import torch
from quantization_definitions import layer, lists

from prune.magnitude import magnitude_mask
from prune.pattern import Sparsity
from prune.ria import ria_mask, ria_scores
from prune.wanda import input_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (6, 21)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_definition(shape, dtype, power):
    weight, gram = layer(*shape, dtype=dtype)
    norm = input_norm(gram)
    scores = definition.ria(lists(weight), lists(norm), power)
    found = ria_scores(weight, norm, power)
    torch.testing.assert_close(found.double(), torch.tensor(scores, dtype=torch.float64), rtol=1e-5, atol=0)
    for share in (0.0, 0.5, 0.9):
        expected = definition.by_matrix(lists(found), int(share * weight.numel() + 1e-9))
        assert ria_mask(weight, norm, Sparsity(share), power=power).tolist() == expected
    expected = definition.by_pattern(lists(found), 2, 4)
    assert ria_mask(weight, norm, Sparsity(pattern=(2, 4)), power=power).tolist() == expected


def test_rows_and_columns_of_zeros_have_no_score_and_harm_nobody():
    weight = torch.ones(4, 6)
    weight[1], weight[:, 2] = 0, 0
    scores = ria_scores(weight, torch.ones(6))
    assert not scores[1].any() and not scores[:, 2].any() and scores.isfinite().all()
    assert not ria_scores(torch.zeros(2, 3), torch.ones(3)).any()


def test_inputs_that_were_never_seen_leave_the_weights_to_decide():
    weight, _ = layer(4, 16)
    asked = Sparsity(0.5)
    assert torch.equal(ria_mask(weight, torch.zeros(16), asked), ria_mask(weight, torch.ones(16), asked))


def test_a_small_output_keeps_what_magnitude_would_take_from_it():
    weight, _ = layer(64, 8)
    weight[0] *= 1e-3
    assert not magnitude_mask(weight, Sparsity(0.5))[0].any()
    assert ria_mask(weight, torch.ones(8), Sparsity(0.5))[0].sum() >= 2
