"""Runs a plan on a Ray cluster: a task for each file of the output, which the workers write to shared storage.

What is sent to a worker is how the plan is made, not the plan: a worker opens the inputs itself, and refuses to go on
unless its plan is the same to the last byte of the layout and the inputs' headers, sizes and dates. So a machine that
sees other files, or has another wtool, is found out before it writes. A task whose process or machine is gone is begun
anew elsewhere, and goes on from the journal of its part; one that is whole is not done again, whoever asks.
"""

import os
import pickle
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from wtool.errors import Mismatch, MissingInput
from wtool.executors.cluster import RETRIES, connected, result
from wtool.executors.local import Outcome, Progress
from wtool.executors.local import run as run_here
from wtool.executors.parts import Part, parts_of, take_over, write_part
from wtool.memory import keep_freed_memory
from wtool.plan import Plan
from wtool.writer import Writer, is_complete


def run(
    make: Callable[[], Plan],
    plan: Plan,
    out: Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda nbytes: None,
) -> Outcome:
    """Carry out a plan on a cluster, or go on with one that was stopped.

    make: makes the plan anew, in a worker; a partial of a function that a module has
    plan: what it makes here
    address: of the cluster; see `connected`
    workers: threads of a task, each with a processor of its own; 1 if None

    raises: WtoolError; what was done is kept and continued by the same call
    """
    threads = workers or 1
    resumed = 0

    def on_cluster(writer: Writer) -> None:
        nonlocal resumed
        parts = [part for part in parts_of(plan) if not all(name in writer.done for name in part.shard.tensors)]
        left = [part for part in parts if not is_complete(part.folder(writer.work), writer.fingerprint)]
        resumed = sum(part.nbytes for part in parts) - sum(part.nbytes for part in left)
        progress(resumed)
        if left:
            arguments = (pickle.dumps(make), str(writer.work.resolve()), os.getcwd(), threads, allow_nonfinite)
            _write_parts(left, writer.fingerprint, arguments, plan.peak_bytes(threads), address, progress)
        for part in parts:
            take_over(part, writer)

    outcome = run_here(plan, out, force=force, elsewhere=on_cluster, progress=progress)
    return replace(outcome, resumed_bytes=outcome.resumed_bytes + resumed)


def _write_parts(
    parts: list[Part],
    fingerprint: str,
    arguments: tuple[bytes, str, str, int, bool],
    memory: int,
    address: str | None,
    progress: Progress,
) -> None:
    """Have parts written, and return when all are whole."""
    with connected(address) as ray:
        task = ray.remote(num_cpus=arguments[3], memory=memory, max_retries=RETRIES)(write_named)
        waiting: dict[Any, Part] = {task.remote(part.name, fingerprint, *arguments): part for part in parts}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                part = waiting.pop(reference)
                result(ray, reference, f"{part.shard.filename}")
                progress(part.nbytes)


def write_named(
    name: str, fingerprint: str, make: bytes, work: str, folder: str, threads: int, allow_nonfinite: bool
) -> None:
    """Write a part, in a worker.

    make: pickled, what makes the plan
    folder: that paths in the recipe start from

    raises: WtoolError, Mismatch where the inputs are not those of the process that asks
    """
    host = platform.node()
    for needed in (folder, work):
        if not os.path.isdir(needed):
            raise MissingInput(f"{needed}: is not on {host}; all machines need the same folders, on shared storage")
    os.chdir(folder)
    plan, parts = _planned(make, folder)
    if plan.fingerprint() != fingerprint:
        raise Mismatch(
            f"{host} has other inputs, or another version of wtool, than the machine that started this: all need the "
            "same files with the same dates, on shared storage"
        )
    keep_freed_memory()
    # one more thread than processors, as one is likely to wait for the storage
    write_part(plan, parts[name], Path(work), fingerprint, workers=threads + 1, allow_nonfinite=allow_nonfinite)


@lru_cache(maxsize=1)  # a worker writes many parts of one plan
def _planned(make: bytes, folder: str) -> tuple[Plan, dict[str, Part]]:
    plan: Plan = pickle.loads(make)()
    return plan, {part.name: part for part in parts_of(plan)}
