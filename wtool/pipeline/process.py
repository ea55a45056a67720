"""Runs a job's command in a process of its own, here or on a cluster: what it used, what it told, how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wtool.errors import RuntimeProblem

from .child import TELL_TO
from .jobs import Job


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    seconds: float
    figures: dict[str, Any]  # what it printed on stdout, as JSON
    error: str | None  # why it failed
    peak_bytes: int | None = None  # of resident memory


Run = Callable[[Job, Sequence[str], Path], Ended]  # a job, the arguments of `wtool`, a file for what it says


def run_here(job: Job, arguments: Sequence[str], log: Path) -> Ended:
    """Run `wtool ARGUMENTS` as a child of this process, which ends with it.

    Its progress is shown where this process has a terminal; else what it says goes into a file.

    log: for stderr, where that is no terminal
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "wtool.executors.tied", str(os.getpid()), *_command(arguments)]
    begin = time.perf_counter()
    peak, tell_to = os.pipe()
    with log.open("wb") as said, open(peak, "rb") as peak_told:
        done = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr.isatty() else said,
            pass_fds=[tell_to],
            env={**os.environ, TELL_TO: str(tell_to)},
        )
        os.close(tell_to)
        told, _ = done.communicate()
        kilobytes = peak_told.read()
    ended = ended_as(done.returncode, told, log.read_bytes(), time.perf_counter() - begin)
    return replace(ended, peak_bytes=int(kilobytes) * 1024 if kilobytes else None)


@contextmanager
def on_cluster(address: str | None) -> Iterator[Run]:
    """A function that runs a job's command on a Ray cluster, in the current folder, which all machines share.

    raises: RuntimeProblem
    """
    from wtool.executors import ray_jobs

    with ray_jobs.cluster(address, Path.cwd()) as run:

        def run_there(job: Job, arguments: Sequence[str], log: Path) -> Ended:
            log.parent.mkdir(parents=True, exist_ok=True)
            needs = job.asked.resources
            command = ray_jobs.Command(_command(arguments), cpus=needs.cpus, gpus=needs.gpus, memory=needs.bytes)
            begin = time.perf_counter()
            try:
                done = run(command)
            except RuntimeProblem as error:
                return Ended(time.perf_counter() - begin, {}, str(error))
            log.write_text(done.stderr, encoding="utf-8")
            return ended_as(done.code, done.stdout.encode(), done.stderr.encode(), time.perf_counter() - begin)

        yield run_there


def _command(arguments: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-m", "wtool.pipeline.child", *arguments)


def ended_as(code: int, told: bytes, said: bytes, seconds: float) -> Ended:
    """Read what a command left behind.

    told: its stdout
    said: the end of its stderr, as far as that is known
    """
    try:
        figures = json.loads(told)
    except ValueError:
        figures = {}
    if code == 0:
        return Ended(seconds, figures, None)
    if code < 0:
        why = ": most often the system does so where memory runs out" if -code == signal.SIGKILL else ""
        return Ended(seconds, figures, f"killed by {signal.Signals(-code).name}{why}")
    lines = [line.removeprefix("error: ") for line in said.decode(errors="replace").splitlines() if line.strip()]
    return Ended(seconds, figures, str(figures.get("error") or (lines[-1] if lines else f"ended with code {code}")))
