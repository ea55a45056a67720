"""The barrier against its definition; lines of models that share a basin and of some that do not; the command."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from tiny_models import TEXT, llama, saved, tokenizer
from transformers import LlamaForCausalLM

import wtool.demo
from mergekit_lite.soups.barrier import APART, CONNECTED, Line, kind, matrix, reading, shares
from mergekit_lite.soups.barrier_plot import _ticks, picture, save
from wtool.cli import run
from wtool.demo.texts import held_out_text

DEMO = Path(wtool.demo.__file__).parent / "models"
SIZE = ("--window", "64", "--limit-tokens", "200")


def slow_barrier(losses: list[float]) -> tuple[float, float]:
    """The two definitions as they are written: over the line between the ends, and over their mean."""
    last = len(losses) - 1
    barrier = rise = -math.inf
    for i, loss in enumerate(losses):
        t = i / last
        barrier = max(barrier, loss - ((1 - t) * losses[0] + t * losses[last]))
        rise = max(rise, loss - 0.5 * (losses[0] + losses[last]))
    return barrier, rise


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("points", [3, 4, 11])
def test_a_barrier_is_its_definition(points: int, seed: int) -> None:
    chance = random.Random(seed)
    losses = [chance.uniform(1, 5) for _ in range(points)]
    line = Line(shares(points), tuple(losses))
    barrier, rise = slow_barrier(losses)
    assert line.barrier == pytest.approx(barrier, abs=1e-12)
    assert line.rise == pytest.approx(rise, abs=1e-12)
    assert line.losses[line.lowest] == min(losses)
    turned = Line(shares(points), tuple(reversed(losses)))
    assert turned.barrier == pytest.approx(line.barrier, abs=1e-12)


def test_lines_without_a_barrier() -> None:
    falling = Line(shares(5), (3.0, 2.5, 2.0, 1.5, 1.0))
    assert (falling.barrier, falling.lowest, falling.gain, kind(falling)) == (0.0, 4, 0.0, "connected")
    assert falling.rise == 1.0  # the mean of unequal ends is below the worse one
    valley = Line(shares(3), (2.0, 1.5, 2.0))
    assert (valley.barrier, valley.lowest, valley.gain) == (0.0, 1, 0.5)
    assert "Merging pays on this text: wtool merge A B -w 0.5 -w 0.5" in reading(valley, "A", "B")


@pytest.mark.parametrize("height, found", [(CONNECTED, "connected"), (APART, "ridge"), (2 * APART, "apart")])
def test_the_reading_has_three_words(height: float, found: str) -> None:
    line = Line(shares(3), (0.0, height, 0.0))
    assert kind(line) == found
    words = {"connected": "One basin", "ridge": "A low ridge", "apart": "Different basins"}[found]
    assert reading(line, "A", "B")[0].startswith(f"{words}: the barrier is {height:.4f} nats at t = 0.5")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite(bad: float) -> None:
    line = Line(shares(4), (1.0, bad, 2.0, 1.5))
    assert kind(line) == "apart" and "not finite at t = 0.333" in reading(line, "A", "B")[0]
    assert (line.lowest, line.gain) == (0, 0.0)
    assert kind(Line(shares(3), (bad, 1.0, 1.0))) == "unknown"
    assert "nan" not in picture(line, "A", "B").split("points=")[1]
    assert reading(Line(shares(3), (bad, bad, bad)), "A", "B")[1] == "No point of the line has a finite loss."


def test_a_table_of_pairs() -> None:
    assert matrix(3, [(0, 1, 0.1), (0, 2, 0.2), (1, 2, 0.3)]) == [[None, 0.1, 0.2], [0.1, None, 0.3], [0.2, 0.3, None]]


@pytest.mark.parametrize("low, high", [(3.6, 4.46), (0.0, 10.0), (2.0, 2.0), (1.0, 1.00001), (9.9, 31.0)])
def test_ticks_are_few_and_within(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 1 <= len(ticks) <= 6 and low <= ticks[0] <= ticks[-1] <= high * (1 + 1e-12)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's models, which are fine-tunes of one base, and a text that has something of both."""
    folder = tmp_path_factory.mktemp("barrier")
    for name in ("base", "docs", "code"):
        shutil.copytree(DEMO / name, folder / name)
    for domain in ("docs", "code"):
        (folder / f"{domain}.txt").write_text(held_out_text(domain, 3000), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    monkeypatch.setenv("COLUMNS", "160")


def result(capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> dict[str, Any]:
    assert run([verb, *arguments, *SIZE, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_points_are_what_eval_tells(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The ends exactly, and a point between as the merge that is written."""
    texts = ("--text", "docs.txt", "--text", "code.txt")
    found = result(capfd, "barrier", "docs", "code", *texts, "--points", "5", "--base", "base")
    (line,) = found["lines"]
    assert [point["t"] for point in line["points"]] == [0, 0.25, 0.5, 0.75, 1]
    merged = str(tmp_path / "merged")
    assert run(["merge", "docs", "code", "-w", "0.75", "-w", "0.25", "-o", merged]) == 0
    capfd.readouterr()
    for place, model in {0: "docs", -1: "code", 1: merged}.items():
        for text in result(capfd, "eval", model, *texts)["texts"]:
            name = text.pop("file")
            assert line["points"][place]["texts"][name] == text
    assert result(capfd, "eval", "base", *texts)["texts"][0]["perplexity"] == found["base"]["texts"][0]["perplexity"]
    losses = [point["nats_per_token"] for point in line["points"]]
    assert line["barrier"] == pytest.approx(slow_barrier(losses)[0], abs=1e-12)
    assert line["kind"] == "connected" and line["texts"]["docs.txt"]["best"] == 0


def test_a_model_and_itself(capfd: pytest.CaptureFixture[str]) -> None:
    (line,) = result(capfd, "barrier", "docs", "docs", "--text", "docs.txt", "--points", "4")["lines"]
    assert (line["barrier"], line["rise_over_mean"], line["gain"]) == (0, 0, 0)
    assert {point["nats_per_token"] for point in line["points"]} == {line["points"][0]["nats_per_token"]}


def trained(model: LlamaForCausalLM, text: str, steps: int, seed: int) -> LlamaForCausalLM:
    ids = torch.tensor(tokenizer()(text, verbose=False)["input_ids"])
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - 33, (8,))
        batch = torch.stack([ids[start : start + 33] for start in starts])
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


def test_independent_models_are_apart_and_fine_tunes_are_not(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    half = len(TEXT) // 2
    for seed in (1, 2):
        alone = trained(llama(seed, initializer_range=0.1), TEXT, 120, seed)
        saved(alone, tmp_path / f"alone-{seed}")
    for number, text in enumerate((TEXT[:half], TEXT[half:])):
        start = LlamaForCausalLM.from_pretrained(tmp_path / "alone-1")
        saved(trained(start, text, 10, number), tmp_path / f"tuned-{number}")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    models = [str(tmp_path / name) for name in ("tuned-0", "tuned-1", "alone-2")]
    found = result(capfd, "barrier", *models, "--text", str(tmp_path / "text.txt"), "--points", "3")
    pairs = {(Path(line["first"]).name, Path(line["second"]).name): line for line in found["lines"]}
    assert pairs["tuned-0", "tuned-1"]["kind"] == "connected"
    for tuned in ("tuned-0", "tuned-1"):
        line = pairs[tuned, "alone-2"]
        assert line["kind"] == "apart" and line["barrier"] > 5 * APART


def test_shown_to_people(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["barrier", "docs", "code", "base", "--text", "docs.txt", "--points", "3", *SIZE]
    assert run([*command, "--plot", str(tmp_path / "line.svg")]) == 0
    shown = capfd.readouterr().out
    assert "docs.txt: 200 tokens, float32 on cpu, windows of 64 tokens" in shown
    for words in ("t (docs → code)", "t (code → base)", "One basin: the barrier is", "barriers, nats a token"):
        assert words in shown
    assert (tmp_path / "line.svg").read_bytes().count(b"<polyline") == 3


def test_pictures_of_three_kinds(tmp_path: Path) -> None:
    lines = [("a <1>", "b", Line(shares(3), (2.0, 2.5, 1.0))), ("a <1>", "c", Line(shares(3), (2.0, 1.0, 1.5)))]
    paths = [tmp_path / f"line{ending}" for ending in (".svg", ".html", ".png")]
    for path in paths:
        save(path, lines, "held.txt")
    svg, page, png = (path.read_bytes() for path in paths)
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and b"var(" not in svg
    assert svg.count(b"<polyline") == page.count(b"<polyline") == 2
    assert page.startswith(b"<!doctype html>") and b"a &lt;1&gt; to b: a barrier of 1.0000 nats a token" in page
    assert png.startswith(b"\x89PNG")


def test_the_picture_of_a_line_is_to_scale() -> None:
    """Equal losses are at equal heights, and the highest is at the top."""
    (drawn,) = re.findall(
        r'polyline class="line" points="([^"]+)"', picture(Line(shares(3), (1.0, 3.0, 1.0)), "a", "b")
    )
    (x0, y0), (x1, y1), (x2, y2) = ([float(part) for part in point.split(",")] for point in drawn.split())
    assert y0 == y2 > y1 and x1 - x0 == pytest.approx(x2 - x1, abs=0.11)


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["docs", "--text", "docs.txt"], 2, "a line has two ends: give two checkpoints or more; 1 is given"),
        (["docs", "code", "--text", "docs.txt", "--plot", "x.gif"], 2, "--plot x.gif: the file's ending tells"),
        (["docs", "code", "--text", "docs.txt", "--plot", "no/x.svg"], 4, "no/x.svg: there is no folder no"),
        (["docs", "code", "--text", "none.txt"], 3, "none.txt: no such text file"),
        (["docs", "code", "--text", "docs.txt", "--points", "2"], 2, "--points"),
        (["docs", "code"], 2, "--text"),
    ],
)
def test_errors(arguments: list[str], code: int, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["barrier", *arguments]) == code
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_models_of_other_shapes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models = [str(saved(llama(hidden_size=size), tmp_path / str(size))) for size in (32, 64)]
    assert run(["barrier", *models, "--text", "docs.txt"]) == 3
    assert "is [320, 32] in" in (error := capfd.readouterr().err) and error.count("\n") == 1


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(wtool.demo.__file__).parents[2])}
    command = ["barrier", "docs", "code", "--text", "docs.txt", "--plot", str(tmp_path / "x.svg")]
    slow = ["--points", "400", "--window", "64", "--stride", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "wtool", *command, *slow], stderr=subprocess.PIPE, text=True, env=environment
    )
    while process.poll() is None and not list(tmp_path.glob("wtool-model-*")):
        time.sleep(0.01)
    time.sleep(1)  # a model is loaded in a moment, and measured for seconds
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "stopped\n" and process.returncode == 130
    assert list(tmp_path.iterdir()) == []
