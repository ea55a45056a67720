"""Several optimizers as one, and which parameters Muon takes."""

import copy

import pytest
import torch
from tiny_models import llama

from distill.optimizers import muon
from wtool.errors import UsageError


def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    model = llama(tie_word_embeddings=True)
    first, second = muon(model, lr=1e-3, weight_decay=0.1).parts
    taken = {id(p) for group in first.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    assert names == {name for name, p in model.named_parameters() if "_proj" in name}
    rest = {id(p) for group in second.param_groups for p in group["params"]}
    assert taken | rest == {id(p) for p in model.parameters()} and not taken & rest
    with pytest.raises(UsageError, match="muon"):
        muon(model, lr=1e-3, nonsense=1)


def test_its_state_goes_on_where_it_was() -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(input_ids=torch.arange(3, 20)[None]).logits.square().mean().backward()
        optimizer.step()

    straight = llama()
    optimizer = muon(straight, lr=1e-2)
    for _ in range(2):
        step(straight, optimizer)
    again = llama(seed=1)
    again.load_state_dict(straight.state_dict())
    other = muon(again, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0] is other.parts[0].param_groups[0]
    for _ in range(2):
        step(straight, optimizer)
        step(again, other)
    for ours, theirs in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
