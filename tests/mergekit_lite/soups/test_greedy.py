"""Greedy soups: the search against its definition, and the command against `wtool eval` and `wtool merge`."""

import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import killing
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved

import wtool.demo
from mergekit_lite.soups import held_out
from mergekit_lite.soups.greedy import greedy
from mergekit_lite.soups.ledger import Ledger
from wtool.cli import run
from wtool.demo.texts import held_out_text
from wtool.errors import OutputExists

DEMO = Path(wtool.demo.__file__).parent / "models"
SIZE = ("--window", "64", "--limit-tokens", "150")


def slow_greedy(count: int, loss: Callable[[tuple[int, ...]], float]) -> set[int]:
    """Recipe 1 of the paper, as it stands there, for losses without ties."""
    ingredients: set[int] = set()
    left = sorted(range(count), key=lambda i: loss((i,)))
    for i in left:
        if not ingredients or loss(tuple(sorted(ingredients | {i}))) <= loss(tuple(sorted(ingredients))):
            ingredients.add(i)
    return ingredients


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_search_is_its_definition(count: int, seed: int) -> None:
    chance = random.Random(seed)
    subsets = [each for size in range(1, count + 1) for each in combinations(range(count), size)]
    losses = {each: chance.random() for each in subsets}
    asked: list[tuple[int, ...]] = []

    def loss(members: tuple[int, ...]) -> float:
        asked.append(members)
        return losses[members]

    trials = list(greedy(count, loss))
    taken = tuple(sorted(trial.model for trial in trials if trial.taken))
    assert set(taken) == slow_greedy(count, losses.__getitem__)
    assert losses[taken] <= min(losses[(i,)] for i in range(count))
    assert sorted(trial.model for trial in trials) == list(range(count))
    assert [trial.alone for trial in trials] == sorted(losses[(i,)] for i in range(count))
    assert len(asked) == len(set(asked)) == 2 * count - 1


def test_equal_losses_are_taken_and_what_is_not_finite_is_left() -> None:
    assert all(trial.taken for trial in greedy(4, lambda members: 1.0))
    alone = {0: math.nan, 1: 2.0, 2: math.inf, 3: 1.0}
    trials = list(greedy(4, lambda members: alone[members[0]] if len(members) == 1 else math.nan))
    assert [(trial.model, trial.taken) for trial in trials] == [(3, True), (1, False), (0, False), (2, False)]
    assert not any(trial.taken for trial in greedy(2, lambda members: math.nan))


def test_a_ledger_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    first = Ledger(out)
    assert first.find("x") is None
    first.keep("x", [1.25, math.nan])
    first.keep("y", [0.1 + 0.2])
    second = Ledger(out)
    (number, nothing), exact = second.find("x") or [], second.find("y")
    assert (number, exact) == (1.25, [0.1 + 0.2]) and math.isnan(nothing)
    second.path.write_bytes(second.path.read_bytes()[:-9])  # as a machine that lost power leaves it
    assert Ledger(out).find("x") is None
    second.remove()
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    Ledger(out, force=True).require_room()
    with pytest.raises(OutputExists, match="out: there already; --force replaces it"):
        Ledger(out).require_room()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's models, some with noise (up and down the same, once added and once taken off), held-out texts."""
    folder = tmp_path_factory.mktemp("greedy")
    for name in ("base", "docs", "code"):
        shutil.copytree(DEMO / name, folder / name)
    tensors = load_file(DEMO / "docs/model.safetensors")
    torch.manual_seed(0)
    noise = {name: torch.randn(tensor.shape) for name, tensor in tensors.items()}
    for name, factor in {"noise": 0.3, "up": 0.02, "down": -0.02}.items():
        shutil.copytree(DEMO / "docs", folder / name)
        moved = {key: (tensor.float() + factor * noise[key]).to(tensor.dtype) for key, tensor in tensors.items()}
        save_file(moved, folder / name / "model.safetensors", {"format": "pt"})
    for domain in ("docs", "code"):
        (folder / f"{domain}.txt").write_text(held_out_text(domain, 3000), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "160")


def soup(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> dict[str, Any]:
    assert run(["merge", *arguments, *SIZE, "-o", str(out), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["greedy"]


def evaluated(capsys: pytest.CaptureFixture[str], model: str, texts: Sequence[str]) -> float:
    """The mean loss over texts, as `wtool eval` finds it."""
    assert run(["eval", model, *(word for text in texts for word in ("--text", text)), *SIZE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["texts"]
    return sum(each["nats_per_token"] for each in found) / len(found)


def test_never_worse_than_the_best_and_noise_is_left(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models, texts = ["noise", "base", "docs", "code"], ["docs.txt", "code.txt"]
    out = tmp_path / "out"
    found = soup(capfd, out, *models, "--greedy", texts[0], "--greedy", texts[1])
    alone = {model: evaluated(capfd, model, texts) for model in models}
    assert {each["model"]: each["alone"] for each in found["tried"]} == alone
    assert evaluated(capfd, str(out), texts) == found["nats_per_token"] <= min(alone.values())
    taken = [each["model"] for each in found["tried"] if each["taken"]]
    assert "docs" in taken and "noise" not in taken
    assert json.loads((out / "wtool.json").read_bytes())["greedy"] == found
    plain = tmp_path / "plain"
    assert run(["merge", *(model for model in models if model in taken), "-o", str(plain)]) == 0
    for name, content in killing.contents(plain).items():
        assert (out / name).read_bytes() == content or name == "wtool.json"
    assert not list(tmp_path.glob(".*"))


def test_what_helps_is_taken(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The mean of a model moved one way and the other is the model itself."""
    found = soup(capfd, tmp_path / "out", "noise", "up", "down", "--greedy", "docs.txt")
    assert [each["taken"] for each in found["tried"]] == [True, True, False]
    assert found["nats_per_token"] < found["tried"][0]["alone"]
    assert found["nats_per_token"] == pytest.approx(evaluated(capfd, "docs", ["docs.txt"]), abs=0.01)


def test_the_same_model_twice_is_that_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = soup(capfd, tmp_path / "out", "docs", "docs", "--greedy", "docs.txt")
    assert [each["taken"] for each in found["tried"]] == [True, True]
    mine, theirs = load_file(tmp_path / "out/model.safetensors"), load_file("docs/model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_another_method_and_its_base(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    method = ("--method", "ties", "--base", "base", "--density", "0.5")
    found = soup(capfd, out, "docs", "base", "code", *method, "--greedy", "docs.txt", "--greedy", "code.txt")
    assert {each["model"] for each in found["tried"]} == {"docs", "code"}
    assert evaluated(capfd, str(out), ["docs.txt", "code.txt"]) == found["nats_per_token"]
    for each in found["tried"]:
        assert run(["merge", each["model"], *method, "-o", str(tmp_path / each["model"])]) == 0
        capfd.readouterr()
        assert evaluated(capfd, str(tmp_path / each["model"]), ["docs.txt", "code.txt"]) == each["alone"]


def test_shown_to_people_and_nothing_is_done_twice(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: linear\nmodels: [{model: docs}, {model: noise}]\n")
    command = ["merge", str(recipe), "--greedy", "docs.txt", *SIZE]
    assert run([*command, "--dry-run"]) == 0
    assert "greedy: 2 models to take or leave, at most 3 evaluations of 150 tokens each, one model of" in (
        capfd.readouterr().out
    )
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    shown = capfd.readouterr().out
    assert "perplexity on docs.txt: 150 tokens, windows of 64" in shown
    assert "taken: the best alone" in shown and "left: rises" in shown
    assert "the soup of 1 of 2 models has" in shown
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    assert "there already, made by this recipe from these inputs" in capfd.readouterr().out
    assert run([*command[:-1], "140", "-o", str(tmp_path / "out")]) == 4
    assert capfd.readouterr().err == f"error: {tmp_path / 'out'}: there already; --force replaces it\n"


def test_kill_and_resume_give_the_same_bytes(tmp_path: Path) -> None:
    command = ["merge", "base", "docs", "code", "noise", "--greedy", "docs.txt", "--greedy", "code.txt", *SIZE, "-o"]
    straight = killing.start([*command, str(tmp_path / "straight")])
    straight.join()
    assert straight.exitcode == 0
    out = tmp_path / "out"
    process = killing.start([*command, str(out)])
    while process.is_alive() and len(_measured(out)) < 2:
        time.sleep(0.002)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 2 <= len(_measured(out)) < 7 and not out.exists()
    again = killing.start([*command, str(out)])
    again.join()
    assert again.exitcode == 0
    assert killing.contents(out) == killing.contents(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


def _measured(out: Path) -> dict[str, Any]:
    path = Ledger(out).path
    return json.loads(path.read_bytes()) if path.exists() else {}


def test_what_was_measured_is_not_measured_again(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A ledger that says something else is believed where inputs and texts are the same, and only there."""
    found = soup(capfd, tmp_path / "out", "docs", "code", "--greedy", "docs.txt")
    ledger = Ledger(tmp_path / "other")
    for key in found["measured"]:
        ledger.keep(key, [7.0])
    believed = soup(capfd, tmp_path / "other", "docs", "code", "--greedy", "docs.txt")
    assert believed["nats_per_token"] == 7.0
    for key in found["measured"]:
        ledger.keep(key, [7.0])
    fresh = soup(capfd, tmp_path / "other", "docs", "code", "--greedy", "code.txt", "--force")
    assert 7.0 not in [each["alone"] for each in fresh["tried"]]


def test_texts_of_other_tokens_are_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved(llama(), tmp_path / "a")
    assert run(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--greedy", "docs.txt", "-o", "out"]) == 3
    assert "b" in (error := capfd.readouterr().err) and error.count("\n") == 1
    saved(llama(), tmp_path / "b", with_tokenizer=False)
    assert run(["merge", str(tmp_path / "b"), "--greedy", "docs.txt", "-o", str(tmp_path / "out")]) == 3
    assert "no tokenizer beside the weights" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["docs", "code", "--window", "8"], 2, "--window tells how --greedy measures; give --greedy HELD.txt"),
        (["docs", "code", "-m", "regmean", "--window", "8"], 2, "--window tells how --greedy measures; give --greedy"),
        (["docs", "code", "--greedy", "docs.txt", "--stride", "9", "--window", "8"], 2, "--stride 9 is beyond"),
        (["docs", "code", "--greedy", "docs.txt", "-m", "slerp", "-t", "0.5"], 2, "one model or more"),
        (["docs", "code", "--greedy", "none.txt"], 3, "none.txt: no such text file"),
        (["docs", "code", "--greedy", "docs.txt", "--low-disk"], 2, "--low-disk is for work that reads each"),
        (["docs", "code", "--greedy", "docs.txt", "--compute-dtype", "int8"], 2, "dtype 'int8' is not one of"),
    ],
)
def test_errors(arguments: list[str], code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", *arguments, "-o", str(tmp_path / "out")]) == code
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_memory_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:     3000 kB\n")
    monkeypatch.setattr(held_out, "MEMINFO", tmp_path / "meminfo")
    assert run(["merge", "docs", "code", "--greedy", "docs.txt", "-o", str(tmp_path / "out")]) == 5
    error = capfd.readouterr().err
    assert "one model in float32 takes 3.9 MB of memory, and 3.1 MB are free" in error
    assert soup(capfd, tmp_path / "out", "docs", "--greedy", "docs.txt", "--compute-dtype", "bfloat16")
