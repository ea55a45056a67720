"""What is observed of a model is what hooks on transformers' own model see, summed up slowly in float64."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_models import blocks
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prune.importance import Importance, observe
from wtool.calibrate import Where
from wtool.calibration_data import Windows
from wtool.checkpoint import open_checkpoint

NAMES = ["llama", "gpt2", "gemma3_text", "qwen3_moe", "bert", "opt"]
IDS = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.arange(12) < torch.tensor([12, 12, 12, 7])[:, None]
WINDOWS = Windows(IDS, MASK, {})
Full = Callable[[str], tuple[PreTrainedModel, Path]]
Calls = dict[str, list[tuple[Tensor, Tensor]]]  # by module: its inputs and outputs, [tokens, features] a window


def observed(folder: Path, batch_tokens: int = 24) -> Importance:
    where = Where(dtype="F32", batch_tokens=batch_tokens)
    return observe(open_checkpoint(str(folder)), WINDOWS, where, lambda steps: lambda done: None)


def calls(model: PreTrainedModel) -> Calls:
    """What every module is called with and gives, window by window, in float64."""
    seen: Calls = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given: Any = args[0] if args else kwargs.get("hidden_states")
            came: Any = output[0] if isinstance(output, tuple) else output
            if all(isinstance(each, Tensor) and each.is_floating_point() for each in (given, came)):
                pair = (given.reshape(-1, given.shape[-1]).double(), came.reshape(-1, came.shape[-1]).double())
                seen.setdefault(name, []).append(pair)

        return note

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
        for window in WINDOWS.unpadded():
            model(input_ids=window[None])
    return seen


def paths(model: PreTrainedModel) -> list[str]:
    """The names of the layers."""
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in blocks(model)]


@pytest.mark.parametrize("name", NAMES)
def test_an_input_s_energy_is_its_mean_square_times_that_of_the_weights_that_read_it(name: str, full: Full) -> None:
    model, folder = full(name)
    found, seen = observed(folder), calls(model)
    compared = set()
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{layer}.") for layer in paths(model))
        if inside and isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.detach().double()
            weight = weight if isinstance(module, nn.Linear) else weight.T
            rows = torch.cat([given for given, _ in seen[path]])
            expected = [float((rows[:, j] ** 2).mean() * (weight[:, j] ** 2).sum()) for j in range(rows.shape[1])]
            energy = found.energies[f"{path}.weight"]
            assert energy.dtype == torch.float32
            torch.testing.assert_close(energy.double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-9)
            compared.add(f"{path}.weight")
    experts = {each for each in found.energies if ".experts." in each}
    assert found.energies.keys() == compared | experts and len(compared) >= 8
    assert len(experts) == (2 * 4 * 3 if name == "qwen3_moe" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_s_influence_is_how_much_it_turns_its_input_before_any_final_norm(name: str, full: Full) -> None:
    model, folder = full(name)
    found, seen = observed(folder), calls(model)
    for number, path in enumerate(paths(model)):
        turns = [
            1 - float(before @ after / before.norm() / after.norm())
            for given, came in seen[path]
            for before, after in zip(given, came, strict=True)
        ]
        assert len(turns) == 43
        assert found.influences[number] == pytest.approx(sum(turns) / len(turns), abs=1e-5)
    assert sorted(found.influences) == [0, 1] and min(found.influences.values()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_ends_are_the_states_of_the_last_tokens(name: str, full: Full) -> None:
    model, folder = full(name)
    found, seen = observed(folder), calls(model)
    first, second = paths(model)
    states = [
        [given[-1] for given, _ in seen[first]],
        [given[-1] for given, _ in seen[second]],
        [came[-1] for _, came in seen[second]],
    ]
    assert len(found.ends) == 3
    for end, expected in zip(found.ends, states, strict=True):
        torch.testing.assert_close(end.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


FINAL = {"llama": "model.norm", "gemma3_text": "model.norm", "qwen3_moe": "model.norm", "gpt2": "transformer.ln_f"}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt2", "bert"])
def test_a_norm_s_spread_is_each_channel_s_share_of_its_tokens_squares(name: str, full: Full) -> None:
    model, folder = full(name)
    found, seen = observed(folder), calls(model)
    for tensor, spread in found.spread.items():
        path = tensor.removesuffix(".weight")
        shares = []
        for row in torch.cat([given for given, _ in seen[path]]):
            centred = row - row.mean() if isinstance(model.get_submodule(path), nn.LayerNorm) else row
            shares.append(centred**2 / (centred**2).mean())
        torch.testing.assert_close(spread.double(), torch.stack(shares).mean(0), rtol=1e-4, atol=1e-6)
    norms = {path for path in seen if path.split(".")[-1] in ("ln_1", "ln_2", "LayerNorm") or "norm" in path}
    inside = {path for path in norms if path.startswith(tuple(f"{layer}." for layer in paths(model)))}
    final = {FINAL[name]} if name in FINAL else set()
    assert {tensor.removesuffix(".weight") for tensor in found.spread} == inside | final


def test_batches_do_not_matter(full: Full) -> None:
    _, folder = full("qwen3_moe")
    one, many = observed(folder, 12), observed(folder, 1000)
    for key, energy in one.energies.items():
        torch.testing.assert_close(energy, many.energies[key], rtol=1e-3, atol=1e-7)
    assert one.influences == pytest.approx(many.influences, abs=1e-5)
    for layer in (0, 1):
        assert torch.equal(one.visits[layer], many.visits[layer])
        torch.testing.assert_close(one.strengths[layer], many.strengths[layer], rtol=1e-4, atol=1e-6)


def test_a_model_without_experts_has_none_observed(full: Full) -> None:
    _, folder = full("llama")
    found = observed(folder)
    assert not found.strengths and not found.visits
