"""What a walk is said to compute, beside what torch counts in a forward of the same model."""

from pathlib import Path

import pytest
import torch
from tiny_models import llama, saved
from torch.utils.flop_counter import FlopCounterMode

from wtool.checkpoint import open_checkpoint
from wtool.work import walk_work


@pytest.mark.parametrize(("samples", "seqlen"), [(1, 16), (3, 32)])
def test_the_arithmetic_of_a_forward(tmp_path: Path, samples: int, seqlen: int) -> None:
    model = llama(hidden_size=64, intermediate_size=160)
    source = open_checkpoint(str(saved(model, tmp_path)))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.model(torch.zeros(samples, seqlen, dtype=torch.int64))
    told = walk_work(source, samples, seqlen, forwards=1, fits=False)["flops"]
    assert told == pytest.approx(counted.get_total_flops(), rel=0.2)
    assert walk_work(source, samples, seqlen, forwards=2, fits=False)["flops"] == 2 * told


def test_fitting_costs_gram_matrices_and_a_loop_over_columns(tmp_path: Path) -> None:
    source = open_checkpoint(str(saved(llama(), tmp_path)))
    plain, fitted = (walk_work(source, 2, 16, forwards=1, fits=fits) for fits in (False, True))
    assert fitted["flops"] > plain["flops"] and fitted["peak_memory_bytes"] > plain["peak_memory_bytes"]
