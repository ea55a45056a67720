"""Bits spread over layers from the command line, on tiny models, opened again in transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import saved_family
from killing import contents
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant import allocate_cli
from quant.allocated import overrides
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.errors import RuntimeProblem
from wtool.grid import Grid
from wtool.loading import load_model, quiet
from wtool.recipe_parts import fits

CALIBRATION = ["--samples", "4", "--seqlen", "48"]
Quantize = Callable[..., Path]


@pytest.fixture(scope="module")
def statistics(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "stats"
    assert run(["calibrate", str(model), "--gradients", "--calib", str(text), *CALIBRATION, "-o", str(out), "-q"]) == 0
    return out


@pytest.fixture
def quantize(statistics: Path, tmp_path: Path) -> Quantize:
    """Quantize from statistics in groups of 32; the output's folder."""

    def go(model: Path, *flags: str, name: str = "out") -> Path:
        out = tmp_path / name
        given = [] if "--calib" in flags else ["--stats", str(statistics)]
        assert run(["quantize", str(model), "-g", "32", *given, *flags, "-o", str(out), "--quiet"]) == 0
        return out

    return go


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_text())


def bits(folder: Path) -> dict[str, int]:
    return {name: entry["bits"] for name, entry in manifest(folder)["allocation"]["layers"].items()}


def packed_bytes(folder: Path) -> int:
    """Of all tensors that stand in the place of a weight."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                if ".weight_" in name:
                    tensor = opened.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


def weight_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)), dtype="F32")(input_ids=ids).logits


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))


def test_an_average_takes_no_more_bytes_than_half_of_each_grid(model: Path, quantize: Quantize) -> None:
    mixed, three, four = (quantize(model, "-m", "rtn", "-b", b, name=b) for b in ("3.5", "3", "4"))
    told = manifest(mixed)["allocation"]
    assert (
        told["bytes"] == packed_bytes(mixed) <= told["budget_bytes"] == (packed_bytes(three) + packed_bytes(four)) // 2
    )
    assert told["weighted"] is True and 0 <= told["gap"] <= 1e-4
    assert len(set(bits(mixed).values())) > 1
    assert {name: entry["bits"] for name, entry in manifest(mixed)["report"].items()} == bits(mixed)


def test_a_target_size_holds_for_the_files_of_the_weights(model: Path, quantize: Quantize) -> None:
    least = weight_files(quantize(model, "-m", "rtn", "-b", "2", name="least"))
    for size in (least, least + 5001, least + 20_000):
        out = quantize(model, "-m", "rtn", "--target-size", str(size), name=str(size))
        assert size - 1000 < weight_files(out) <= size
        told = manifest(out)
        stored = sum(told["allocation"]["layers"][name]["bits"] for name in told["report"])
        assert stored >= 2 * len(told["report"])


def test_more_room_foretells_no_more_loss(model: Path, quantize: Quantize) -> None:
    losses = [
        manifest(quantize(model, "-m", "rtn", "-b", b, name=b))["allocation"]["predicted_loss"]
        for b in ("2.0", "3.2", "8.0")
    ]
    assert losses == sorted(losses, reverse=True) and losses[0] > 10 * losses[-1]


def test_it_is_better_than_one_grid_of_the_same_size(model: Path, quantize: Quantize) -> None:
    """By the divergence that the weights were chosen for."""
    text = torch.randint(3, 300, (16, 48), generator=torch.Generator().manual_seed(11))
    full = logits(model, text).log_softmax(-1)

    def divergence(name: str) -> float:
        ours = logits(quantize(model, "-m", "rtn", "-b", name, name=name), text).log_softmax(-1)
        return float((full.exp() * (full - ours)).sum(-1).mean())

    assert divergence("3.0") < 0.95 * divergence("3")


def test_gptq_on_text_gathers_what_it_needs_and_leaves_nothing(
    model: Path, text: Path, quantize: Quantize, tmp_path: Path
) -> None:
    flags = ["--calib", str(text), *CALIBRATION, "-b", "3.5"]
    out, again = quantize(model, *flags), quantize(model, *flags, name="again")
    assert contents(out) == contents(again)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert manifest(out)["recipe"]["calibration"]["samples"] == 4
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids()).logits
    torch.testing.assert_close(logits(out, ids()), theirs, rtol=2e-2, atol=2e-2)


def test_the_recipe_that_is_saved_or_told_gives_the_same_again(model: Path, quantize: Quantize, tmp_path: Path) -> None:
    saved = tmp_path / "saved.yml"
    out = quantize(model, "-b", "3.5", "--save-allocation", str(saved))
    told = tmp_path / "told.yml"
    told.write_text(yaml.safe_dump(manifest(out)["recipe"]["quantize"]))
    for number, recipe in enumerate((saved, told)):
        assert run(["quantize", str(recipe), "-o", str(tmp_path / str(number)), "--quiet"]) == 0
        ours, theirs = contents(out), contents(tmp_path / str(number))
        assert {name: ours[name] for name in ours if name.endswith((".safetensors", "config.json"))} == {
            name: theirs[name] for name in theirs if name.endswith((".safetensors", "config.json"))
        }


def test_a_stopped_run_goes_on_and_what_is_there_is_not_done_again(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quantize: Quantize,
) -> None:
    flags = ["--calib", str(text), *CALIBRATION, "-b", "3.5"]
    command = ["quantize", str(model), "-g", "32", *flags, "-o", str(tmp_path / "out"), "--quiet"]

    def stops(*args: object, **kwargs: object) -> None:
        raise RuntimeProblem("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(allocate_cli, "_settle", stops)
        assert run(command) == 5
    stamp = (tmp_path / ".out.allocation" / "stats" / "wtool.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("quant.run.run_quantization", stops)
        assert run(command) == 5
    assert (tmp_path / ".out.allocation" / "stats" / "wtool.json").stat().st_mtime_ns == stamp
    with monkeypatch.context() as patch:
        patch.setattr(allocate_cli, "_gathered", stops)
        patch.setattr(allocate_cli, "_settle", stops)  # both were done
        assert run(command) == 0
        capsys.readouterr()
        assert run(command) == 0
        assert "there already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(quantize(model, *flags, name="at-once"))


def test_a_dry_run_shows_the_table(model: Path, statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["quantize", str(model), "-g", "32", "-b", "3.5", "--dry-run"]
    assert run([*flags, "--stats", str(statistics)]) == 0
    shown = capsys.readouterr().out
    assert "q_proj: " in shown and "bits 3.5: " in shown and "no problem found" in shown
    assert run([*flags, "--stats", str(statistics), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["allocation"]["layers"]) == 21
    assert run(flags) == 0
    told = capsys.readouterr()
    assert "give" in told.err or "--stats" in told.err
    assert "21 layers: 3 bits" in told.out


def test_overrides_and_what_is_ignored_stay(model: Path, quantize: Quantize) -> None:
    out = quantize(model, "-m", "rtn", "-b", "3.5", "--layer-bits", "down_proj=8", "--ignore", "layers.0.")
    told = manifest(out)
    assert not any("down_proj" in name or "layers.0." in name for name in bits(out))
    assert {entry["bits"] for name, entry in told["report"].items() if "down_proj" in name} == {8}
    assert len(told["report"]) == 14 and len(bits(out)) == 12


def test_vllm_gets_fused_layers_alike_of_bits_that_it_takes(model: Path, quantize: Quantize) -> None:
    chosen = bits(quantize(model, "-m", "rtn", "-b", "5.0", "--target", "vllm"))
    assert set(chosen.values()) == {4, 8}
    for layer in range(3):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({chosen[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
        assert len({chosen[f"{mlp}.{name}_proj"] for name in ("gate", "up")}) == 1


def test_candidates_may_have_groups_of_their_own(model: Path, quantize: Quantize) -> None:
    out = quantize(
        model, "-m", "rtn", "-b", "3.5", *(f for c in ("3", "4/16", "4", "4/64") for f in ("--candidate", c))
    )
    layers = manifest(out)["allocation"]["layers"].values()
    found = {(entry["bits"], entry["group_size"]) for entry in layers}
    assert found <= {(3, 32), (4, 16), (4, 32), (4, 64)} and len(found) > 2
    assert not any(
        entry["group_size"] == 64
        for name, entry in manifest(out)["allocation"]["layers"].items()
        if "down_proj" in name
    )  # 64 does not divide its 96 inputs


def test_one_candidate_is_one_grid(model: Path, quantize: Quantize) -> None:
    one, plain = (
        quantize(model, "-m", "rtn", "-b", "4.0", "--candidate", "4", name="a"),
        quantize(model, "-m", "rtn", name="b"),
    )
    assert contents(one)["model.safetensors"] == contents(plain)["model.safetensors"]


def test_experts(text: Path, tmp_path: Path) -> None:
    saved_family("mixtral", tmp_path / "model")
    flags = ["-g", "16", "-b", "3.5", "--calib", str(text), *CALIBRATION, "--quiet"]
    assert run(["quantize", str(tmp_path / "model"), *flags, "-o", str(tmp_path / "out")]) == 0
    chosen = bits(tmp_path / "out")
    assert len({given for name, given in chosen.items() if "experts" in name}) == 1  # as transformers decodes them
    assert len(set(chosen.values())) > 1


def test_vllm_gets_experts_alike_in_each_block(text: Path, tmp_path: Path) -> None:
    saved_family("mixtral", tmp_path / "model", num_hidden_layers=3)
    flags = ["-g", "16", "-b", "6.0", "--target", "vllm", "--calib", str(text), *CALIBRATION, "--quiet"]
    assert run(["quantize", str(tmp_path / "model"), *flags, "-o", str(tmp_path / "out")]) == 0
    of_blocks = [
        {given for name, given in bits(tmp_path / "out").items() if f"layers.{layer}.block_sparse_moe" in name}
        for layer in range(3)
    ]
    assert all(len(found) == 1 for found in of_blocks) and len(set.union(*of_blocks)) == 2


def test_patterns_fit_their_modules_and_no_others() -> None:
    names = [
        f"model.layers.{i}.{part}"
        for i in range(12)
        for part in ("mlp.down_proj", "mlp.experts.1.w2", "mlp.experts.11.w2")
    ]
    grids = {name: Grid(2 + (7 * i) % 5, 32) for i, name in enumerate(names)}
    chosen = {name: grid for name, grid in grids.items() if grid.bits != 4}
    made = overrides(chosen)
    assert len(made) <= 2 * 4
    for name in [*names, "model.layers.1.mlp.down_projector", "model.layers.111.mlp.down_proj"]:
        fitting = [entry["bits"] for entry in made if fits(entry["filter"], name)]
        assert fitting == ([chosen[name].bits] if name in chosen else [])


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["-b", "3.5.1"], 2, "an average with a point, as 3.5"),
        (["-b", "1.5"], 2, "'bits'"),
        (["-b", "9.5"], 2, "'bits'"),
        (["-b", "4", "--target-size", "90MB"], 2, "give one of them"),
        (["--target-size", "ninety"], 2, "'ninety' is not a size"),
        (["--target-size", "10kB"], 2, "too small; the smallest that the candidates allow is "),
        (["-b", "2.5", "--candidate", "3"], 2, "too small"),
        (["-b", "3.5", "--candidate", "7"], 2, "candidate '7': write bits"),
        (["-b", "3.5", "--candidate", "4/x"], 2, "candidate '4/x': write bits"),
        (["-b", "3.5", "--candidate", "3/48"], 2, "no candidate for 'model.layers.0"),
        (["--candidate", "4"], 2, "candidates are for an average"),
        (["-b", "3.5", "-f", "gptq"], 2, "take the format compressed-tensors"),
        (["-b", "3.5", "-f", "awq"], 2, "take the format compressed-tensors"),
        (["-b", "3.5", "-f", "gguf"], 2, "does not go with the format gguf"),
        (["-b", "3.5", "--low-disk"], 2, "--low-disk is for work that reads each tensor once"),
        (["-b", "4", "--save-allocation", "x.yml"], 2, "--save-allocation"),
        (["-b", "3.5", "-g", "48"], 3, "groups of 48 do not divide"),
        (["-b", "3.5", "--target", "vllm", "--candidate", "3"], 2, "no candidate for"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(
    model: Path,
    statistics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    groups = [] if "-g" in flags else ["-g", "32"]
    command = [
        "quantize",
        str(model),
        *groups,
        "--stats",
        str(statistics),
        *flags,
        "-o",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert run(command) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_smallest_size_that_is_told_is_one_that_can_be(
    model: Path, statistics: Path, quantize: Quantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["quantize", str(model), "-m", "rtn", "-g", "32", "--stats", str(statistics), "-o", str(tmp_path / "no")]
    assert run([*flags, "--target-size", "10kB"]) == 2
    told = capsys.readouterr().err.split(" is ")[-1].removesuffix(" bytes\n").replace(",", "")
    assert weight_files(quantize(model, "-m", "rtn", "--target-size", told)) == int(told)
    assert run([*flags, "--target-size", str(int(told) - 1)]) == 2
