"""`wtool merge --method regmean` as a user runs it: what it says, what it refuses, recipes."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from killing import contents
from safetensors.torch import load_file
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM

from wtool.cli import run

WALK = ["--samples", "4", "--seqlen", "32"]
Shown = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models a and b, another c of one layer, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        saved(llama(seed).bfloat16(), folder / name)
    saved(llama(num_hidden_layers=1), folder / "c")
    (folder / "text.txt").write_text("\n\n".join(topics[name] for name in ("for", "while", "class")))
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-m", "regmean", "-p", "beta=1"], "unknown key 'parameters.beta'"),
        (["-m", "regmean", "-p", "alpha=1.5"], "'parameters.alpha'"),
        (["-m", "regmean", "--density", "0.5"], "unknown key 'parameters.density'"),
        (["-m", "regmean", "--base", "a"], "unknown key 'parameters.base_model'"),
        (["-m", "regmean", "-w", "0"], "the weights of all models are 0"),
        (["-m", "regmean", "-w", "-1"], "weight"),
        (["-m", "regmean", *["--calib", "text.txt"] * 3], "--calib is given 3 times for 2 models"),
        (["-m", "regmean", "--stats", "s"], "--stats is given 1 times for 2 models; give it once a model"),
        (["-m", "regmean", *["--stats", "s"] * 2, "--samples", "3"], "--stats takes the place of text"),
        (["-m", "regmean++", *["--stats", "s"] * 2], "regmean++ runs text through the merged layers"),
        (["-m", "regmean", "--low-disk"], "--low-disk is for work that reads each tensor once"),
        (["-m", "regmean", "--executor", "ray"], "regmean runs in this process"),
        (["--calib", "text.txt"], "--calib is for --method regmean and regmean++"),
        (["-m", "ties", "--stats", "s"], "--stats is for --method regmean and regmean++"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], told: str, tmp_path: Path, capsys: Shown) -> None:
    assert run(["merge", "a", "b", *flags, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_models_that_are_unlike_are_refused_before_any_text_is_read(tmp_path: Path, capsys: Shown) -> None:
    assert run(["merge", "a", "c", "-m", "regmean", "--calib", "no.txt", "-o", str(tmp_path / "out")]) == 3
    assert "'model.layers.1." in capsys.readouterr().err


def test_a_plan_is_shown_from_headers(capsys: Shown) -> None:
    assert run(["merge", "a", "b", "-m", "regmean++", "--calib", "text.txt", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("14 linear layers by regmean++, all else averaged\n")
    assert shown.endswith("no problem found\n")


def test_lifted_statistics_are_refused(tmp_path: Path, capsys: Shown) -> None:
    stats = str(tmp_path / "stats")
    assert run(["calibrate", "a", "--calib", "text.txt", *WALK, "--lift", "-o", stats, "-q"]) == 0
    assert run(["merge", "a", "b", "-m", "regmean", "--stats", stats, "--stats", stats, "-o", str(tmp_path / "x")]) == 3
    assert f"{stats}: these statistics are of lifted tokens" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_statistics_in_another_order_are_refused(tmp_path: Path, capsys: Shown) -> None:
    stats = str(tmp_path / "stats")
    assert run(["calibrate", "a", "--calib", "text.txt", *WALK, "-o", stats, "-q"]) == 0
    assert run(["merge", "a", "b", "-m", "regmean", "--stats", stats, "--stats", stats, "-o", str(tmp_path / "x")]) == 3
    assert (
        "these statistics are of a and stand in the place of b's; give them in the order of the models"
        in capsys.readouterr().err
    )


def test_a_merge_opens_and_tells_and_its_recipe_is_the_same_work(tmp_path: Path, capsys: Shown) -> None:
    out = tmp_path / "out"
    command = ["merge", "a", "b", "-m", "regmean++", "--calib", "text.txt", *WALK, "--dtype", "float32", "-o", str(out)]
    assert run([*command, "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    manifest = json.loads((out / "wtool.json").read_bytes())
    assert told["report"] == manifest["report"] and len(told["report"]) == 14 and told["fallbacks"] == {}
    assert manifest["recipe"]["calibration"][0]["samples"] == 4 and len(manifest["recipe"]["calibration"]) == 2
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(manifest["recipe"]["merge"]))
    assert run(["merge", str(recipe), "-o", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert "regmean++" in (out / "README.md").read_text()


def test_each_model_has_its_own_text_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(topics["lambda"] + topics["import"])
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": "a"}, {"model": "b", "data": [str(tmp_path / "other.txt")], "parameters": {"weight": 2}}],
        "parameters": {"alpha": 0.5},
        "calibration": {"data": ["text.txt"], "samples": 4, "seqlen": 32},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert run(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "one"), "-q"]) == 0
    texts = ["--calib", "text.txt", "--calib", str(tmp_path / "other.txt")]
    flags = ["-m", "regmean", "-p", "alpha=0.5", "-w", "1", "-w", "2", *texts, *WALK]
    assert run(["merge", "a", "b", *flags, "-o", str(tmp_path / "two"), "-q"]) == 0
    assert contents(tmp_path / "one")["model.safetensors"] == contents(tmp_path / "two")["model.safetensors"]


@pytest.mark.parametrize("extra", [["b"], ["--calib", "text.txt"], ["--stats", "s"], ["-m", "regmean"]])
def test_a_recipe_file_tells_everything(extra: list[str], tmp_path: Path, capsys: Shown) -> None:
    (tmp_path / "recipe.yml").write_text("merge_method: regmean\nmodels: [{model: a}]\n")
    assert run(["merge", str(tmp_path / "recipe.yml"), *extra, "-o", str(tmp_path / "out")]) == 2
    assert "a recipe file tells everything" in capsys.readouterr().err


def test_one_text_for_all_and_the_mean_is_somewhere_else(tmp_path: Path, capsys: Shown) -> None:
    out = tmp_path / "out"
    assert run(["merge", "a", "b", "-m", "regmean", "--calib", "text.txt", *WALK, "-o", str(out), "-q"]) == 0
    assert "the outputs of 14 linear layers are off by" in capsys.readouterr().out
    assert run(["merge", "a", "b", "-o", str(tmp_path / "mean"), "-q"]) == 0
    found, mean = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "mean"))
    different = {name for name in mean if not torch.equal(found[name], mean[name])}
    assert len(different) == 14 and all("proj" in name for name in different)
