"""Commands that know nothing of one another, each a task on a Ray cluster with what it needs.

A command whose worker or machine is lost is run again, so it should be one that goes on where it was, as wtool's are.
One that ends with an error is not: its exit code is its result.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from wtool.executors.cluster import RETRIES, connected, result

TAIL = 20_000  # characters of stderr that are kept, the last ones


@dataclass(frozen=True)
class Command:
    """What is to be run, and what it needs."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # beside what the worker has
    cpus: float = 1
    gpus: float = 0  # Ray shows the command those that are its own (CUDA_VISIBLE_DEVICES)
    memory: int = 0  # bytes; Ray starts no more at a time than there is room for


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int  # of its exit; minus the signal that ended it
    stdout: str
    stderr: str  # the end of it
    host: str


@contextmanager
def cluster(address: str | None, folder: Path) -> Iterator[Callable[[Command], Finished]]:
    """A function that runs a command on a cluster, when there is room for it, and waits; any thread may call it.

    address: of the cluster; see `wtool.executors.cluster.connected`
    folder: where commands are run, on storage that all machines share

    raises: RuntimeProblem where there is no cluster; the function does where a command's worker is lost again and again
    """
    with connected(address) as ray:

        def run(command: Command) -> Finished:
            needs = {"num_cpus": command.cpus, "num_gpus": command.gpus, "memory": command.memory or None}
            task = ray.remote(**needs, max_retries=RETRIES)(run_command)
            return result(ray, task.remote(command, str(folder.resolve())), " ".join(command.argv)[:200])

        yield run


def run_command(command: Command, folder: str) -> Finished:
    """Run a command in this process's place, and end it with this process."""
    tied = [sys.executable, "-m", "wtool.executors.tied", str(os.getpid())]
    if not os.path.isdir(folder):
        return Finished(127, "", f"error: {folder}: no such folder on {platform.node()}\n", platform.node())
    done = subprocess.run(
        [*tied, *command.argv],
        cwd=folder,
        env={**os.environ, **command.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr[-TAIL:], platform.node())
