"""Whether a distillation that is killed twice ends with the weights of one that nobody disturbs."""

import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from distill_peers.cases import Bench, Case

LENGTH = 256  # tokens a window, one window a step: what is tried here does not depend on their number
WAIT = 1800.0  # seconds


def compare(bench: Bench) -> dict[str, Any]:
    """Train to the end; train, kill between two checkpoints and in the writing of one, and go on each time."""
    undisturbed, disturbed = _case(bench, "undisturbed"), _case(bench, "killed")
    python = bench.pythons["wtool"]
    for case in (undisturbed, disturbed):
        bench.clear(case.name)
    _to_end(python, undisturbed, bench)
    training = bench.work(disturbed.name) / "training"
    kills = (("after the first checkpoint", training / "checkpoint-1" / "whole", 1.0),)
    kills += (("while writing the third", training / "checkpoint-3", 0.05),)
    states = [_killed(python, disturbed, mark, delay, training) for _, mark, delay in kills]
    _to_end(python, disturbed, bench)
    digests = [_digest(bench.out(case.name)) for case in (undisturbed, disturbed)]
    return {
        "steps": bench.settings.kill_steps,
        "kills": {what: state for (what, _, _), state in zip(kills, states, strict=True)},
        "sha256": dict(zip(("undisturbed", "killed"), digests, strict=True)),
        "equal": digests[0] == digests[1],
    }


def _case(bench: Bench, name: str) -> Case:
    steps = bench.settings.kill_steps
    data = bench.rows("windows-of-kill", 0, steps + 1)
    text = ("--data", str(data), "--samples", str(steps + 1), "--seqlen", str(LENGTH), "--held-out", "1")
    how = ("--steps", str(steps), "--batch", "1", "--evaluate-every", "1", "--lr", str(bench.settings.lr))
    return bench.distill(f"kill-{name}", bench.students[0], *text, *how)


def _to_end(python: str, case: Case, bench: Bench) -> None:
    with bench.out(f"{case.name}.log").open("wb") as log:
        subprocess.run([python, *case.command], stdout=log, stderr=subprocess.STDOUT, check=True)


def _killed(python: str, case: Case, mark: Path, delay: float, training: Path) -> list[str]:
    """Kill a run some time after a path has appeared; tells which checkpoints it left, and which are whole."""
    process = subprocess.Popen([python, *case.command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + WAIT
    while not mark.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise SystemExit(f"{case.name}: ended before {mark} was there, or took more than {WAIT:.0f} s")
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = sorted(training.glob("checkpoint-*"))
    return [f"{path.name}{'' if (path / 'whole').exists() else ', not whole'}" for path in found]


def _digest(folder: Path) -> str:
    total = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()
