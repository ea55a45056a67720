"""Training factors beside the weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilled import logits, manifest, weights
from tiny_models import llama, saved

from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.loading import load_model

pytest.importorskip("peft")
Distill = Callable[..., Path]


def test_factors_are_added_to_the_student_that_is_written(teacher: Path, text: Path, tmp_path: Path) -> None:
    source = saved(
        llama(2, num_hidden_layers=2, hidden_size=48, intermediate_size=64, initializer_range=0.1), tmp_path / "student"
    )

    def go(*flags: str) -> Path:
        out = tmp_path / f"out{len(flags)}"
        data = ["--data", str(text), "--seqlen", "32", "--steps", "10", "--lr", "1e-2", "--evaluate-every", "5"]
        command = ["distill", str(teacher), str(source), "--lora", "4", *data, *flags, "-o", str(out), "--quiet"]
        assert run(command) == 0
        return out

    merged, kept = go(), go("--keep-adapter")
    told = manifest(merged)["evaluation"]
    assert told[-1]["kl"] < 0.9 * told[0]["kl"]
    before, after = weights(source), weights(merged)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "_proj" in name:
            assert torch.linalg.matrix_rank(after[name] - tensor, rtol=1e-4) <= 4
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor)
    ids = torch.arange(3, 27)[None]
    ours = load_model(open_checkpoint(f"{source}+{kept}"), dtype="F32")
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits.double(), logits(merged, ids), rtol=1e-4, atol=1e-4)
    assert not (kept / "model.safetensors").exists()


def test_factors_beside_some_modules_only(distill: Distill, teacher: Path) -> None:
    flags = ["--lora", "2", "--lora-target", "q_proj", "--lora-target", "v_proj", "--student-layers", "0,1,2,3"]
    out = distill(*flags, "--loss", "forward-kl", "--ce", "1", "--steps", "3")
    before, after = weights(teacher), weights(out)
    changed = {name.split(".")[-2] for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"q_proj", "v_proj"}


def test_a_module_that_is_not_there_is_told(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", str(teacher), "--student-layers", "2", "--data", str(text), "--seqlen", "32", "--steps", "1"]
    out = ["-o", str(tmp_path / "out"), "--quiet"]
    assert run([*command, "--lora", "2", "--lora-target", "nowhere", *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: LoRA targets nowhere: ") and error.count("\n") == 1
    assert run([*command, "--keep-adapter", *out]) == 2
    assert "--lora RANK is missing" in capsys.readouterr().err


def test_student_and_teacher_in_four_bits(teacher: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made = llama(num_hidden_layers=2, hidden_size=64, intermediate_size=64, initializer_range=0.1)
    source, out = saved(made, tmp_path / "student"), tmp_path / "out"
    data = ["--data", str(text), "--seqlen", "32", "--steps", "8", "--lr", "1e-2", "--evaluate-every", "8"]
    four = ["--lora", "4", "--qlora", "--teacher-4bit"]
    assert run(["distill", str(teacher), str(source), *four, *data, "-o", str(out), "--quiet"]) == 0
    first, last = manifest(out)["evaluation"]
    assert last["kl"] < first["kl"]
    before, after = weights(source), weights(out)
    for name, tensor in before.items():  # the student's own weights, not those of four bits
        if "_proj" in name:
            assert torch.linalg.matrix_rank(after[name] - tensor, rtol=1e-4) <= 4
        else:
            assert torch.equal(after[name], tensor)
    assert run(["distill", str(teacher), "--student-layers", "2", *four, *data, "-o", f"{out}2", "--quiet"]) == 2
