"""`rounding: stochastic`: changes that are smaller than a step of bfloat16 are in the output, in the mean."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wtool.cli import run

STEP = 2**-8  # between bfloat16 numbers from 0.5 to 1: an eighth of it and less is lost to the nearest


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """base of 0.5 in bfloat16, and a and b that are 0.1 and 0.05 of a step above it, in float32."""
    base = {"w": torch.full((300, 400), 0.5), "v": torch.full((3,), 0.75)}
    for name, above, dtype in (("base", 0.0, torch.bfloat16), ("a", 0.1, torch.float32), ("b", 0.05, torch.float32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        made = {key: (value + above * STEP * (key == "w")).to(dtype) for key, value in base.items()}
        save_file(made, tmp_path / name / "model.safetensors")
    return tmp_path


def merged(folder: Path, out: str, *options: str) -> dict[str, torch.Tensor]:
    sources = [str(folder / name) for name in ("a", "b")]
    asked = ["merge", *sources, "--base", str(folder / "base"), "-m", "task_arithmetic", "--dtype", "bfloat16"]
    assert run([*asked, *options, "-o", str(folder / out)]) == 0
    return load_file(folder / out / "model.safetensors")


def test_small_task_vectors_stay_in_the_mean(models: Path) -> None:
    nearest = merged(models, "nearest")
    assert bool((nearest["w"] == 0.5).all()), "to the nearest both task vectors are lost"
    found = merged(models, "random", "--rounding", "stochastic")
    assert found["w"].dtype == torch.bfloat16
    assert set(found["w"].double().unique().tolist()) == {0.5, 0.5 + STEP}
    assert (found["w"].double().mean().item() - 0.5) / STEP == pytest.approx(0.15, abs=0.005)  # 0.001 is one sigma
    assert torch.equal(found["v"], nearest["v"]), "what bfloat16 holds is not changed"


def test_what_rounding_to_the_nearest_loses_is_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged(models, "lost")
    assert "rounding to 16 bits left 0% of what the merge changes (the median of 1 matrices)" in capsys.readouterr().err
    merged(models, "kept", "--rounding", "stochastic")
    merged(models, "longer", "--dtype", "float32")
    merged(models, "whole", "--weight", "10", "--weight", "0")  # a's 0.1 of a step becomes one: nothing is lost
    assert "rounding" not in capsys.readouterr().err
    report = json.loads((models / "whole" / "wtool.json").read_text())["report"]
    assert report["w"]["kept"] == pytest.approx(1, abs=1e-4)


def test_the_short_steps_of_model_stock_are_rounded_at_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = torch.Generator().manual_seed(1)
    base, shared = torch.randn(80, 70, generator=made), torch.randn(80, 70, generator=made)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        moved = base + 2e-3 * (0.5 * shared + torch.randn(80, 70, generator=made)) * (name != "base")
        save_file({"w": moved if name != "base" else base.bfloat16()}, tmp_path / name / "model.safetensors")
    asked = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--base", str(tmp_path / "base"), "-m", "model_stock"]
    for out, options in {
        "exact": ["--dtype", "float32"],
        "own": ["--dtype", "bfloat16"],
        "nearest": ["--dtype", "bfloat16", "--rounding", "nearest"],
    }.items():
        assert run([*asked, *options, "-o", str(tmp_path / out)]) == 0
        assert ("rounding to 16 bits left" in capsys.readouterr().err) == (out == "nearest")
    way, own, nearest = (
        load_file(tmp_path / out / "model.safetensors")["w"].double() - base.bfloat16().double()
        for out in ("exact", "own", "nearest")
    )
    along = [((made * way).sum() / (way * way).sum()).item() for made in (own, nearest)]
    assert along[0] == pytest.approx(1.0, abs=0.1)
    assert along[1] < 0.8


def test_the_seed_decides(models: Path) -> None:
    first = merged(models, "first", "--rounding", "stochastic", "--workers", "1")
    again = merged(models, "again", "--rounding", "stochastic", "--workers", "3")
    other = merged(models, "other", "--rounding", "stochastic", "--seed", "1")
    assert torch.equal(first["w"], again["w"])
    assert not torch.equal(first["w"], other["w"])


def test_an_unknown_rounding_is_one_line(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(models / "a"), str(models / "b")
    assert run(["merge", a, b, "--rounding", "random", "-o", str(models / "x")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "rounding" in told[0]
    assert "stochastic" in told[0]


def test_regmean_says_that_it_rounds_to_the_nearest(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(models / "a"), str(models / "b")
    asked = ["merge", a, b, "-m", "regmean", "--rounding", "stochastic", "--calib", "x.txt", "-o", str(models / "x")]
    assert run(asked) == 2
    assert "--rounding is not for --method regmean" in capsys.readouterr().err


def test_float32_has_nothing_to_round(models: Path) -> None:
    plain = merged(models, "plain", "--dtype", "float32")
    asked = merged(models, "asked", "--dtype", "float32", "--rounding", "stochastic")
    assert torch.equal(plain["w"], asked["w"])
