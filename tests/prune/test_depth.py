"""Which layers stay, found again by trying everything and by the papers' definitions."""

import json
import random
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from math import acos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_models import blocks
from tiny_models import llama, saved
from transformers import LlamaForCausalLM

from prune.depth import CANDIDATES, before_last, by_angle, by_influence, by_loss, removals
from wtool.calibration_data import Windows
from wtool.calibration_data.for_model import windows_asked
from wtool.checkpoint import open_checkpoint
from wtool.recipe_parts import Calibration

Prune = Callable[..., Path]


def interacting(seed: int, depth: int) -> Callable[[Collection[int]], float]:
    """A loss in which layers make up for each other."""
    rng = random.Random(seed)
    alone = [rng.random() for _ in range(depth)]
    pairs = [[rng.gauss(0, 0.5) for _ in range(depth)] for _ in range(depth)]
    return lambda lacks: sum(alone[i] + sum(pairs[i][j] for j in lacks if j > i) for i in lacks)


def greedy(loss: Callable[[Collection[int]], float], depth: int, keep: int) -> tuple[int, ...]:
    left = list(range(depth))
    while len(left) > keep:
        lacking = [[*(set(range(depth)) - set(left)), layer] for layer in left]
        losses = [loss(frozenset(each)) for each in lacking]
        del left[losses.index(min(losses))]
    return tuple(left)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("depth", "keep"), [(1, 1), (2, 1), (8, 8), (8, 3), (11, 1)])
def test_by_loss_takes_out_what_trying_every_layer_takes_out(seed: int, depth: int, keep: int) -> None:
    loss = interacting(seed, depth)
    asked: list[int] = []

    def losses(lacks: Sequence[Collection[int]]) -> list[float]:
        asked.append(len(lacks))
        return [loss(each) for each in lacks]

    assert by_loss(losses, depth, keep) == greedy(loss, depth, keep)
    assert asked == [depth - number for number in range(depth - keep)]


def test_of_many_layers_the_likely_ones_are_tried() -> None:
    loss = interacting(5, 40)
    tried: list[set[int]] = []

    def losses(lacks: Sequence[Collection[int]]) -> list[float]:
        common = frozenset.intersection(*map(frozenset, lacks)) if len(lacks) > 1 else frozenset[int]()
        tried.append({layer for each in lacks for layer in each} - common)
        return [loss(each) for each in lacks]

    found = removals(losses, 40, 6)
    assert [len(each) for each in tried] == [40] + [CANDIDATES] * 5
    first = sorted(range(40), key=lambda layer: loss({layer}))
    assert found[0] == (first[0], loss({first[0]})) and tried[1] == set(first[1 : 1 + CANDIDATES])
    gone = [layer for layer, _ in found]
    assert [value for _, value in found] == pytest.approx([loss(frozenset(gone[:count])) for count in range(1, 7)])
    assert len(set(gone)) == 6


def test_of_equal_losses_the_first_layer_goes() -> None:
    assert by_loss(lambda lacks: [0.0] * len(lacks), 5, 3) == (2, 3, 4)


def test_by_influence_keeps_the_layers_that_turn_most_and_of_equal_ones_the_first() -> None:
    influences = {0: 0.3, 1: 0.1, 2: 0.2, 3: 0.1, 4: 0.9, 5: 0.1}
    kept = {1: (4,), 2: (0, 4), 3: (0, 2, 4), 4: (0, 1, 2, 4), 5: (0, 1, 2, 3, 4), 6: (0, 1, 2, 3, 4, 5)}
    assert {keep: by_influence(influences, keep) for keep in kept} == kept


@pytest.mark.parametrize("keep", [1, 2, 5, 7, 8])
def test_by_angle_takes_out_the_run_that_turns_least(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    steps = torch.randn(9, 5, 6, generator=generator) * torch.rand(9, 1, 1, generator=generator)
    ends = list(steps.cumsum(0))  # before each of eight layers and after the last
    distances = []
    for first in range(keep + 1):
        turns = []
        for before, after in zip(ends[first].double(), ends[first + 8 - keep].double(), strict=True):
            turns.append(acos(min(1.0, float(before @ after / before.norm() / after.norm()))) / pi)
        distances.append(sum(turns) / len(turns))
    first = distances.index(min(distances)) if keep < 8 else 8
    gone = range(first, first + 8 - keep)
    assert by_angle(ends, keep) == tuple(layer for layer in range(8) if layer not in gone)


def test_states_that_do_not_turn_at_all_have_an_angle_of_zero() -> None:
    state = torch.randn(4, 16)
    ends = [state, state * 3.7, torch.randn(4, 16), torch.randn(4, 16)]
    assert by_angle(ends, 2) == (1, 2)


@pytest.mark.parametrize(("depth", "keep", "kept"), [(6, 6, (0, 1, 2, 3, 4, 5)), (6, 3, (0, 1, 5)), (6, 1, (5,))])
def test_before_last(depth: int, keep: int, kept: tuple[int, ...]) -> None:
    assert before_last(depth, keep) == kept


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[LlamaForCausalLM, Path, Windows]:
    """A llama of five layers, of which some do little, and what it is calibrated on."""
    model = llama(num_hidden_layers=5)
    with torch.no_grad():
        for number, factor in ((1, 0.3), (2, 0.1), (3, 0.2)):
            layer: Any = model.model.layers[number]
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(factor)
    folder = saved(model, tmp_path_factory.mktemp("deep") / "model")
    asked = Calibration(data=(str(text),), samples=8, seqlen=48)
    return model, folder, windows_asked(open_checkpoint(str(folder)), asked)


def test_the_command_keeps_the_layers_that_trying_all_models_keeps(
    deep: tuple[LlamaForCausalLM, Path, Windows], prune: Prune
) -> None:
    model, folder, windows = deep
    layers = blocks(model)

    @torch.no_grad()
    def loss(lacks: Collection[int]) -> float:
        without = deepcopy(model)
        without.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in lacks)
        scores = without(input_ids=windows.ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        return -float(scores.gather(-1, windows.ids[:, 1:, None]).mean())

    kept = json.loads((prune(folder, "--layers", "2") / "wtool.json").read_text())["recipe"]["kept"]["layers"]
    assert tuple(kept) == greedy(loss, 5, 2)


@pytest.mark.parametrize("score", ["block-influence", "angular", "last"])
def test_the_command_keeps_the_layers_that_hidden_states_tell(
    score: str, deep: tuple[LlamaForCausalLM, Path, Windows], prune: Prune
) -> None:
    model, folder, windows = deep
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in blocks(model)]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    with torch.no_grad():
        model(input_ids=windows.ids)
    for hook in hooks:
        hook.remove()
    cosine = torch.nn.functional.cosine_similarity
    if score == "block-influence":
        turns = [float(cosine(states[i].double(), states[i + 1].double(), dim=-1).mean()) for i in range(5)]
        expected = sorted(sorted(range(5), key=lambda layer: turns[layer])[:3])
    elif score == "angular":
        runs = [
            cosine(states[i][:, -1].double(), states[i + 2][:, -1].double(), dim=-1).acos().mean() for i in range(4)
        ]
        first = min(range(4), key=lambda number: float(runs[number]))
        expected = [layer for layer in range(5) if layer not in (first, first + 1)]
    else:
        expected = [0, 1, 4]
    out = prune(folder, "--layers", "3", "--depth-score", score)
    assert json.loads((out / "wtool.json").read_text())["recipe"]["kept"]["layers"] == expected
