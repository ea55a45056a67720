"""kill -9 at random moments of a merge; the same command then gives the bytes of an undisturbed run.

WTOOL_KILLS says how many kills (default 12). Each merge runs in a process of its own, forked with everything
imported, so that the kills fall into the merge and not into `import torch`.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from wtool.cli import run
from wtool.writer import work_folder

KILLS = int(os.environ.get("WTOOL_KILLS", "12"))
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.w{j}": torch.randn(512, 512, generator=generator) for i in range(6) for j in range(4)}
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        tuned = {k: (x + 0.01 * torch.randn(x.shape, generator=generator)).bfloat16() for k, x in base.items()}
        save_file(tuned, folder / name / "model.safetensors")
    return folder


def start(command):
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(run([*command, "--quiet"])))
    process.start()
    return process


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_kill_is_survived(models, tmp_path, capfd):
    def command(out, *more):
        inputs = [str(models / name) for name in ("a", "b")]
        flags = ["-m", "ties", "--base", str(models / "base"), "--density", "0.4", "--shard-size", "3MB"]
        return ["merge", *inputs, *flags, "-o", str(out), *more]

    begin = time.perf_counter()
    undisturbed = start(command(tmp_path / "straight"))
    undisturbed.join()
    seconds = time.perf_counter() - begin
    expected = contents(tmp_path / "straight")
    chance = random.Random(0)
    moments = {"before anything": 0, "half done": 0, "output there": 0}
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        process = start(command(out))
        if number == 0:  # whatever chance does, one comes as soon as there is something half done
            while process.is_alive() and not work_folder(out).exists():
                time.sleep(0.001)
        else:
            time.sleep(chance.uniform(0, 1.05 * seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        moment = "output there" if out.exists() else "half done" if work_folder(out).exists() else "before anything"
        moments[moment] += 1
        again = start(command(out))
        again.join()
        assert again.exitcode == 0, capfd.readouterr().err
        assert contents(out) == expected
        assert not work_folder(out).exists()
        for path in out.iterdir():
            path.unlink()
    print(f"{KILLS} kills: {moments}")
    assert moments["half done"] > 0


def test_kills_under_force_leave_the_old_output_or_the_new(models, tmp_path):
    """The old output stays until the new one is whole, and the same command ends what a kill began."""
    out, inputs = tmp_path / "out", [str(models / "a"), str(models / "b")]
    for target, weight in ((out, "0.5"), (tmp_path / "old", "0.5"), (tmp_path / "new", "0.25")):
        assert run(["merge", *inputs, "-w", weight, "-w", "0.75", "-o", str(target)]) == 0
    old, new = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new"))
    command = ["merge", *inputs, "-w", "0.25", "-w", "0.75", "--force", "-o", str(out)]
    chance = random.Random(1)
    for _ in range(max(KILLS // 3, 1)):
        process = start(command)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (out / "model.safetensors").exists():
            assert (out / "model.safetensors").read_bytes() in (old, new)
        else:  # between the two renames: both are in the hidden folder
            assert (work_folder(out) / "replaced").is_dir() and (work_folder(out) / "output").is_dir()
        again = start(command)
        again.join()
        assert again.exitcode == 0
        assert (out / "model.safetensors").read_bytes() == new
        assert run(["merge", *inputs, "-w", "0.5", "-w", "0.75", "--force", "-o", str(out)]) == 0


def test_ctrl_c_is_one_word_and_the_work_goes_on(models, tmp_path):
    """Ctrl-C as soon as the first files are there."""
    inputs = [str(models / name) for name in ("a", "b")]
    command = ["merge", *inputs, "-m", "ties", "--base", str(models / "base"), "--density", "0.4"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "wtool", *command, "-o", str(out), "--workers", "1"], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (work_folder(out) / "journal").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode in (0, 130)
    assert errors == ("stopped\n" if process.returncode else "")
    assert run([*command, "-o", str(out)]) == 0
