"""What takes more than one verb: several sparsities from one calibration, and recovery by distillation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killing import contents
from pruned_models import manifest, opened
from transformers import PreTrainedModel

from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.loading import load_model

Full = Callable[[str], tuple[PreTrainedModel, Path]]
Prune = Callable[..., Path]
TEXT = ["--samples", "8", "--seqlen", "48"]


def test_several_sparsities_are_those_of_the_saved_statistics(
    full: Full, prune: Prune, text: Path, tmp_path: Path
) -> None:
    _, folder = full("llama")
    out = prune(folder, "-m", "sparsegpt", "--sparsity", "0.3", "--sparsity", "0.5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # the statistics are gone
    stats = tmp_path / "stats"
    assert run(["calibrate", str(folder), "--calib", str(text), *TEXT, "--lift", "-o", str(stats), "-q"]) == 0
    for share in ("0.3", "0.5"):
        alone = prune(folder, "-m", "sparsegpt", "--sparsity", share, "--stats", str(stats), name=share)
        assert contents(out / share)["model.safetensors"] == contents(alone)["model.safetensors"]


def test_several_sparsities_without_text(full: Full, prune: Prune) -> None:
    _, folder = full("llama")
    out = prune(folder, "-m", "magnitude", "--sparsity", "0.25", "--sparsity", "0.75")
    assert [manifest(out / share)["summary"]["sparsity"] for share in ("0.25", "0.75")] == [0.25, 0.75]


@pytest.mark.parametrize("how", ["distill", "lora"])
def test_recovery_brings_the_model_nearer_to_what_it_was(how: str, full: Full, prune: Prune, tmp_path: Path) -> None:
    _, folder = full("llama")
    out = prune(folder, "--layers", "0,", "--recover", how, "--recover-tokens", "3000")
    assert opened(out).config.num_hidden_layers == 1
    told = manifest(out)["evaluation"]
    assert min(each["kl"] for each in told) < told[0]["kl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["-m", "wanda", "--sparsity", "0.5", "--recover", "lora"], 2, "goes with sizes to keep, not with a method"),
        (["--layers", "1", "--recover", "destill"], 2, "no recovery 'destill'; did you mean 'distill'?"),
        (["-m", "wanda", "--sparsity", "0.5", "--sparsity", "0.6", "--recover", "lora"], 2, "give one --sparsity"),
    ],
)
def test_refusals(
    flags: list[str], code: int, told: str, full: Full, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = full("llama")
    assert run(["prune", str(folder), *flags, "-o", str(tmp_path / "out"), "-q"]) == code
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("amount", [["--sparsity", "0.5"], ["--pattern", "2:4"]])
def test_rounded_in_the_same_loop(amount: list[str], full: Full, prune: Prune) -> None:
    _, folder = full("llama")
    out = prune(folder, "-m", "sparsegpt", *amount, "--bits", "8", "-g", "16")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized"
    source = open_checkpoint(str(out))
    codes = [name for name in source.tensors if name.endswith("_proj.weight")]
    zeros = sum(int((source.read(name) == 0).sum()) for name in codes)
    assert zeros >= 0.5 * sum(source.tensors[name].elements for name in codes)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = load_model(source, dtype="F32")(input_ids=ids).logits
        torch.testing.assert_close(opened(out)(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    plain = prune(folder, "-m", "sparsegpt", *amount, name="plain")
    rounded, pruned = (manifest(each)["report"] for each in (out, plain))
    for name in pruned:
        if ".layers.0." in name:  # the first block is fed alike; 8 bits add little to what pruning costs
            assert rounded[name]["output_error"] < pruned[name]["output_error"] + 0.05


def test_bits_go_with_sparsegpt_alone(full: Full, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = full("llama")
    flags = ["-m", "wanda", "--sparsity", "0.5", "--bits", "4"]
    assert run(["prune", str(folder), *flags, "-o", str(tmp_path / "out")]) == 2
    assert "bits go together with sparsegpt alone" in capsys.readouterr().err
