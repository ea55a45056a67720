"""Sizes cut from the command line: what stays, what norms are scaled by, and that plain transformers opens it."""

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved_family
from masked_models import masked
from pruned_models import manifest, opened
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from prune.importance import Importance, observe
from prune.structure import Kept, axes_of, family_of, shape_of
from wtool.calibrate import Where
from wtool.calibration_data.for_model import windows_asked
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.recipe_parts import Calibration

Prune = Callable[..., Path]
Full = Callable[[str], tuple[PreTrainedModel, Path]]
IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))
CASES: list[tuple[str, dict[str, int]]] = [
    ("llama", {"layers": 1}),
    ("llama", {"ffn": 33}),
    ("llama", {"heads": 2}),
    ("llama", {"kv_heads": 1}),
    ("llama", {"hidden": 24}),
    ("llama", {"layers": 1, "ffn": 1, "heads": 2, "hidden": 8}),
    ("qwen3_moe", {"layers": 1, "experts": 2, "expert_ffn": 8}),
    ("qwen3_moe", {"experts": 3}),
    ("qwen3_moe", {"heads": 2, "hidden": 24, "expert_ffn": 16}),
    ("gpt2", {"layers": 1, "ffn": 96}),
    ("gpt2", {"heads": 3, "hidden": 24}),
    ("gpt2", {"kv_heads": 2, "hidden": 16, "ffn": 64}),
    ("phi3", {"ffn": 20, "heads": 2}),
    ("phi3", {"kv_heads": 1, "hidden": 16, "layers": 1}),
    ("gemma3_text", {"ffn": 32, "kv_heads": 1, "hidden": 24}),
    ("mixtral", {"experts": 2, "expert_ffn": 32, "heads": 2}),
]


def flags(sizes: dict[str, int]) -> list[str]:
    return [part for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", str(size))]


def kept(told: dict[str, Any]) -> Kept:
    """What stayed, as the manifest tells it."""
    by_layer = {
        name: {int(layer): tuple(numbers) for layer, numbers in told.get(name, {}).items()}
        for name in ("ffn", "heads", "kv_heads", "experts")
    }
    inside = {tuple(map(int, place.split("."))): tuple(stay) for place, stay in told.get("expert_ffn", {}).items()}
    hidden = tuple(told["hidden"]) if "hidden" in told else None
    return Kept(tuple(told["layers"]), hidden=hidden, expert_ffn=inside, **by_layer)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    model.set_attn_implementation("eager")
    return model(input_ids=IDS, use_cache=False).logits


def importance(folder: Path, text: Path) -> Importance:
    source = open_checkpoint(str(folder))
    windows = windows_asked(source, Calibration(data=(str(text),), samples=8, seqlen=48))
    return observe(source, windows, Where(dtype="F32"), lambda steps: lambda done: None)


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_a_pruned_model_opens_and_without_making_up_for_anything_is_the_masked_one(
    name: str, sizes: dict[str, int], full: Full, prune: Prune, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = full(name)
    capsys.readouterr()
    assert run(["prune", str(folder), *flags(sizes), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    out = prune(folder, *flags(sizes), "--no-compensate", "--no-rescale-norms", "--depth-score", "block-influence")
    shape, small, told = shape_of(model.config.to_dict()), opened(out), manifest(out)
    expected = logits(masked(model, kept(told["recipe"]["kept"]), shape))
    assert (logits(small) - expected).norm() < 1e-4 * expected.norm()
    cut = shape_of(json.loads((out / "config.json").read_text()))
    assert {size: getattr(cut, size) for size in sizes} == sizes
    # the plan, which reads nothing, foretold it
    assert planned["sizes"] == told["summary"]["sizes"]
    stored = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert planned["params_after"] == told["summary"]["params_after"] == stored
    assert small.num_parameters() == stored


@pytest.mark.parametrize(("name", "sizes"), [case for case in CASES if case[1] != {"layers": 1}])
def test_with_all_that_makes_up_for_losses_it_opens_and_runs(
    name: str, sizes: dict[str, int], full: Full, prune: Prune
) -> None:
    _, folder = full(name)
    out = prune(folder, *flags(sizes), "--depth-score", "angular")
    assert logits(opened(out)).isfinite().all()
    report = manifest(out).get("report", {})
    assert bool(report) == bool(sizes.keys() & {"ffn", "heads", "kv_heads", "expert_ffn"})
    for entry in report.values():
        assert "fallback" in entry or entry["output_error"] <= entry["cut_output_error"] * (1 + 1e-4)


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:keep])


def test_the_parts_with_the_most_energy_stay(full: Full, prune: Prune, text: Path) -> None:
    _, folder = full("qwen3_moe")
    energies = importance(folder, text).energies
    told = manifest(prune(folder, "--expert-ffn", "16", "--heads", "2", "--hidden", "24"))["recipe"]["kept"]
    for layer in (0, 1):
        for expert in range(4):
            energy = energies[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"].tolist()
            assert told["expert_ffn"][f"{layer}.{expert}"] == best(energy, 16)
        by_head = energies[f"model.layers.{layer}.self_attn.o_proj.weight"].view(4, 8).sum(1).tolist()
        first, second = best(by_head[:2], 1), best(by_head[2:], 1)
        assert told["heads"][str(layer)] == [first[0], 2 + second[0]]
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    read = [energy for name, energy in energies.items() if name.endswith(tuple(f"{leaf}.weight" for leaf in readers))]
    assert len(read) == 2 * (3 + 4 * 2)
    assert told["hidden"] == best([sum(float(e[i] / e.sum()) for e in read) for i in range(32)], 24)


@pytest.mark.parametrize("score", ["reap", "frequency"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_experts_that_count_most_stay(name: str, score: str, full: Full, prune: Prune, text: Path) -> None:
    _, folder = full(name)
    found = importance(folder, text)
    scores = found.strengths if score == "reap" else found.visits
    told = manifest(prune(folder, "--experts", "2", "--expert-score", score))["recipe"]["kept"]["experts"]
    assert told == {str(layer): best(scores[layer].tolist(), 2) for layer in (0, 1)}


@pytest.mark.parametrize(("name", "sizes"), [("llama", ["--hidden", "20"]), ("gemma3_text", ["--hidden", "20"]),
                                             ("gpt2", ["--heads", "2", "--hidden", "16"])])  # fmt: skip
def test_norms_are_scaled_by_the_measured_ratio(
    name: str, sizes: list[str], full: Full, prune: Prune, text: Path
) -> None:
    model, folder = full(name)
    spread = importance(folder, text).spread
    out, without = prune(folder, *sizes), prune(folder, *sizes, "--no-rescale-norms", name="without")
    scaled, plain = (load_file(each / "model.safetensors") for each in (out, without))
    told = manifest(out)["recipe"]
    family = family_of(model.config.to_dict())
    seen = [key for key in plain if "norm" in key or ".ln_" in key]
    factors = {}
    for key in seen:
        if key.endswith("weight") and axes_of(family, key) == ("hidden",):
            factors[key] = sqrt(float(spread[key][told["kept"]["hidden"]].mean()))
            offset = family.norm_offset
            torch.testing.assert_close(scaled[key] + offset, (plain[key] + offset) * factors[key])
        else:
            torch.testing.assert_close(scaled[key], plain[key])
    assert told["norms"] == pytest.approx(factors) and len(factors) >= 5
    assert all(abs(factor - 1) > 1e-4 for factor in factors.values())


@pytest.mark.parametrize("name", ["opt", "deepseek_v3"])
@pytest.mark.parametrize("score", ["perplexity", "block-influence", "angular"])
def test_layers_can_go_from_any_family(name: str, score: str, prune: Prune, tmp_path: Path) -> None:
    saved_family(name, tmp_path / "model", num_hidden_layers=3)
    out = prune(tmp_path / "model", "--layers", "2", "--depth-score", score)
    assert logits(opened(out)).isfinite().all()
    assert manifest(out)["summary"]["sizes"] == {"layers": [3, 2]}


def test_layers_that_are_named_or_last_need_no_text_and_so_no_tokenizer(tmp_path: Path) -> None:
    model = saved_family("llama", tmp_path / "model", num_hidden_layers=4)
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    before = model.state_dict()
    for number, (asked, stay) in enumerate({"3,0": (3, 0), "2": (0, 3)}.items()):
        out = tmp_path / f"out{number}"
        command = ["prune", str(tmp_path / "model"), "--layers", asked, "--depth-score", "last", "-o", str(out), "-q"]
        assert run(command) == 0
        after = opened(out).state_dict()
        for new, old in enumerate(stay):
            leaf = "mlp.up_proj.weight"
            assert torch.equal(after[f"model.layers.{new}.{leaf}"], before[f"model.layers.{old}.{leaf}"])
