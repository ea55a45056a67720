"""The loss without some layers is that of transformers' own model with those layers taken out."""

from pathlib import Path

import pytest
import torch
from families import saved_family
from torch import nn
from transformers import PreTrainedModel

from wtool.ablation import losses
from wtool.calibrate import Where
from wtool.checkpoint import open_checkpoint
from wtool.network import Network

torch.manual_seed(0)
WINDOWS = [torch.randint(3, 300, (12,)) for _ in range(3)] + [torch.randint(3, 300, (7,))]


def expected(model: PreTrainedModel, path: str, lacks: set[int]) -> float:
    parent, _, leaf = path.rpartition(".")
    whole = model.get_submodule(path)
    assert isinstance(whole, nn.ModuleList)
    kept = nn.ModuleList(layer for number, layer in enumerate(whole) if number not in lacks)
    setattr(model.get_submodule(parent), leaf, kept)
    total = 0.0
    with torch.no_grad():
        for window in WINDOWS:
            scores = model(input_ids=window[None], use_cache=False).logits[0].double().log_softmax(-1)
            total -= sum(float(scores[i, window[i + 1]]) for i in range(len(window) - 1))
    setattr(model.get_submodule(parent), leaf, whole)
    return total / sum(len(window) - 1 for window in WINDOWS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "opt"])
def test_each_model_has_the_loss_of_the_model_without_those_layers(name: str, tmp_path: Path) -> None:
    model = saved_family(name, tmp_path, num_hidden_layers=4)
    lacks = [set(), {0}, {1}, {3}, {1, 2}, {0, 3}, {1}, {0, 1, 2, 3}]
    network = Network(open_checkpoint(str(tmp_path)), dtype="F32")
    told: list[int] = []
    found = losses(network, WINDOWS, lacks, where=Where(batch_tokens=24), start=lambda steps: told.append)
    path = network.blocks[0].name.rpartition(".")[0]
    for lack, loss in zip(lacks, found, strict=True):
        assert loss == pytest.approx(expected(model, path, lack), rel=1e-5)
    assert sum(told) == 5
