"""What a distillation leaves on disk, and that a stop costs nothing: kill -9 gives the bytes of an undisturbed run."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from distilled import manifest, weights
from killing import contents, start
from safetensors.torch import load_file
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM, AutoTokenizer

from wtool.cli import run
from wtool.loading import quiet
from wtool.writer import work_folder

Distill = Callable[..., Path]


def test_the_output_opens_in_transformers_and_has_the_student_s_names_and_types(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "student"
    made = llama(1, num_hidden_layers=2, hidden_size=48, intermediate_size=64, tie_word_embeddings=True)
    saved(made.to(torch.bfloat16), source)
    out = tmp_path / "out"
    flags = ["--data", str(text), "--seqlen", "32", "--steps", "2", "-o", str(out), "--quiet"]
    assert run(["distill", str(teacher), str(source), *flags]) == 0
    before, after = load_file(source / "model.safetensors"), weights(out)
    assert {name: (each.dtype, each.shape) for name, each in before.items()} == {
        name: (each.dtype, each.shape) for name, each in after.items()
    }
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with quiet():
        again, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(out).encode("while") == AutoTokenizer.from_pretrained(source).encode(
            "while"
        )
    assert again.dtype == torch.bfloat16
    assert "README.md" in contents(out) and b"distilled" in contents(out)["README.md"]


def test_steps_smaller_than_bfloat16_s_are_kept(teacher: Path, text: Path, tmp_path: Path) -> None:
    """A step moves each weight by about 1e-5, most of which to the nearest bfloat16 is nothing."""
    made = llama(1, num_hidden_layers=2, hidden_size=48, intermediate_size=64, initializer_range=0.1).bfloat16()
    flags = ["--data", str(text), "--seqlen", "32", "--steps", "1", "--lr", "1e-5", "--warmup", "0", "--quiet"]
    changes = []
    for name, student in (("long", deepcopy(made).float()), ("short", made)):
        source, out = saved(student, tmp_path / name), tmp_path / f"{name}-out"
        assert run(["distill", str(teacher), str(source), *flags, "-o", str(out)]) == 0
        before = load_file(source / "model.safetensors")
        changes.append(torch.cat([(weights(out)[key].float() - before[key].float()).flatten() for key in before]))
    exact, kept = changes
    assert exact.abs().max() < 2e-5
    nearest = (made.state_dict()["model.embed_tokens.weight"].float() + 1e-5).bfloat16()
    assert (nearest != made.state_dict()["model.embed_tokens.weight"]).float().mean() < 0.1
    assert float(kept @ exact / (exact @ exact)) == pytest.approx(1, abs=0.1)


def test_the_same_command_again_does_nothing_and_another_is_refused(
    distill: Distill, capsys: pytest.CaptureFixture[str], teacher: Path, text: Path
) -> None:
    out = distill()
    before = (out / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    distill()
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    command = ["distill", str(teacher), "--student-layers", "3", "--data", str(text), "--seqlen", "32", "--steps", "1"]
    assert run([*command, "-o", str(out), "--quiet"]) == 4
    assert "--force replaces it" in capsys.readouterr().err
    assert run([*command, "-o", str(out), "--quiet", "--force"]) == 0
    assert manifest(out)["student_layers"] == [0, 2, 3] or len(manifest(out)["student_layers"]) == 3


def kill_when(condition: Callable[[], bool], command: list[str], wait: float = 0.0) -> None:
    """Kill a command some seconds after a condition holds."""
    process = start(command)
    while process.is_alive() and not condition():
        time.sleep(0.002)
    time.sleep(wait)
    with suppress(ProcessLookupError):
        process.kill()
    process.join()


def test_a_killed_training_ends_with_the_same_bytes(teacher: Path, text: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        data = ["--data", str(text), "--seqlen", "32", "--samples", "40", "--batch", "3", "--accumulation", "2"]
        length = ["--steps", "24", "--evaluate-every", "2", "--lr", "3e-3", "--patience", "9"]
        return ["distill", str(teacher), "--student-layers", "2", *data, *length, "-o", str(out)]

    straight = start(command(tmp_path / "straight"))
    straight.join()
    assert straight.exitcode == 0
    expected = contents(tmp_path / "straight")
    out = tmp_path / "out"
    folder = work_folder(out) / "training"
    chance = random.Random(0)
    stops = []
    for step in (4, 12):
        kill_when((folder / f"checkpoint-{step}").exists, command(out), wait=chance.uniform(0, 0.1))
        assert not out.exists()
        stops.append(max(int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*/whole")))
    again = start(command(out))
    again.join()
    assert again.exitcode == 0
    assert 0 < stops[0] < stops[1] < 24
    assert contents(out) == expected
    assert not work_folder(out).exists()


def test_a_kill_after_the_last_step_trains_no_further(teacher: Path, text: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        data = ["--data", str(text), "--seqlen", "32", "--samples", "20", "--steps", "5", "--lr", "3e-3"]
        return ["distill", str(teacher), "--student-layers", "2", *data, "--evaluate-every", "2", "-o", str(out)]

    start(command(tmp_path / "straight")).join()
    out = tmp_path / "out"
    last = work_folder(out) / "training" / "checkpoint-5" / "whole"
    kill_when(last.exists, command(out))
    again = start(command(out))
    again.join()
    assert again.exitcode == 0
    assert contents(out) == contents(tmp_path / "straight")


def test_unfinished_work_of_another_recipe_is_refused_and_named(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["distill", str(teacher), "--student-layers", "2", "--data", str(text), "--seqlen", "32", "-o", str(out)]
    settings = ["--optimizer", "sgd", "--lr", "1e30", "--clip", "0", "--warmup", "0", "--schedule", "constant"]
    assert run([*command, *settings, "--steps", "9", "--quiet"]) == 5
    capsys.readouterr()
    assert run([*command, "--steps", "2", "--quiet"]) == 4
    assert "unfinished work of another recipe" in capsys.readouterr().err
    assert run([*command, "--steps", "2", "--quiet", "--force"]) == 0
    assert len(manifest(out)["training"]) == 2
