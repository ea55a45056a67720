"""kill -9 at random moments of a walk, and once as soon as it has begun; the same command then gives the bytes of an
undisturbed run.

WTOOL_KILLS says how many kills (default 6).
"""

import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from killing import contents, start
from tiny_models import llama, saved

from wtool.writer import work_folder

KILLS = int(os.environ.get("WTOOL_KILLS", "6"))


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "gptaq"])
def test_every_kill_of_a_walk_is_survived(method: str, text: Path, tmp_path: Path) -> None:
    made = llama(num_hidden_layers=8, hidden_size=128, intermediate_size=256)
    source = saved(made.to(torch.bfloat16), tmp_path / "model")

    def command(out: Path) -> list[str]:
        calibration = ["--calib", str(text), "--samples", "16", "--seqlen", "64"]
        return ["quantize", str(source), "-g", "32", "-b", "3", "-m", method, *calibration, "-o", str(out)]

    start(command(tmp_path / "first")).join()  # the server starts with it
    begin = time.perf_counter()
    undisturbed = start(command(tmp_path / "straight"))
    undisturbed.join()
    seconds = time.perf_counter() - begin
    assert undisturbed.exitcode == 0
    expected = contents(tmp_path / "straight")
    chance = random.Random(0)
    moments = {"before anything": 0, "half done": 0, "output there": 0}
    for number in range(KILLS if method == "gptq" else (KILLS + 1) // 2):
        out = tmp_path / f"out{number}"
        process = start(command(out))
        if number:
            time.sleep(chance.uniform(0.2, 1.05) * seconds)
        else:
            while process.is_alive() and not work_folder(out).exists():
                time.sleep(0.002)
        with suppress(ProcessLookupError):  # it may be through
            process.kill()
        process.join()
        moment = "output there" if out.exists() else "half done" if work_folder(out).exists() else "before anything"
        moments[moment] += 1
        again = start(command(out))
        again.join()
        assert again.exitcode == 0
        assert contents(out) == expected
        assert not work_folder(out).exists()
    print(f"{method}: {moments}")
    assert moments["half done"] > 0


def test_a_killed_calibration_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return ["calibrate", str(model), "--calib", str(text), "--samples", "8", "--seqlen", "64", "-o", str(out)]

    start(command(tmp_path / "straight")).join()
    out = tmp_path / "out"
    process = start(command(out))
    while process.is_alive() and not list((work_folder(out) / "output").glob("block-*")):
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        process.kill()
    process.join()
    again = start(command(out))
    again.join()
    assert again.exitcode == 0
    assert contents(out) == contents(tmp_path / "straight")
