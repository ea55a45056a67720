"""Runs a plan in this process: a few threads, each with one step in flight.

A worker asks the system for the bytes of the step that comes next, computes its own from mapped inputs, and puts
the result in its place: a piece at a time where the step makes it so, which is checked and summed in passing. The
steps are in the order of the output's shards, so inputs laid out alike are read from front to back. Results do not
depend on the number of workers: a step knows no other step, and torch computes with one thread inside each.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from wtool import __version__
from wtool.console import working_on
from wtool.errors import RuntimeProblem, UsageError
from wtool.executors.budget import Budget
from wtool.finite import first_nonfinite
from wtool.memory import keep_freed_memory
from wtool.pieces import Pieces, pieces_of
from wtool.plan import Plan, Step, Told
from wtool.shards import json_bytes
from wtool.threads import available_processors, thread_pool
from wtool.writer import MANIFEST, Placed, Writer, checksum, is_complete, tensor_bytes

log = logging.getLogger(__name__)

BYTES_A_WORKER = 1 << 24

Progress = Callable[[int], None]  # is told the bytes written by each step done
Walk = Callable[[Writer], None]
Finish = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    out: Path
    already_there: bool  # the same work had been completed before; nothing was done
    resumed_bytes: int  # written by an earlier run that was stopped


def default_workers() -> int:
    """One for each processor this process may use; others wait for the disk."""
    return available_processors()


def _useful_workers(steps: Sequence[Step]) -> int:
    """Where there is little to compute, threads only stand in each other's way."""
    return min(default_workers(), 1 + sum(step.nbytes_written for step in steps) // BYTES_A_WORKER)


def check_place(plan: Plan, out: Path) -> None:
    """Refuse an output in, at, or around an input.

    raises: UsageError
    """
    here = out.resolve()
    for source in plan.sources:
        for folder in source.folders():
            if here.is_relative_to(folder):
                raise UsageError(f"{out}: is inside the input {source.label}; an input is never changed")
            if folder.is_relative_to(here):
                raise UsageError(f"{out}: holds the input {source.label}; an input is never changed")


def run(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    memory: int | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    walk: Walk | None = None,
    elsewhere: Walk | None = None,
    progress: Progress = lambda nbytes: None,
) -> Outcome:
    """Carry out a plan, or go on with one that was stopped.

    workers: threads; if None as many as there are processors
    memory: bytes that the steps in flight may hold together; None for no bound but the workers
    force: replace an output that is there, discard unfinished work of another recipe
    allow_nonfinite: write NaN and infinity instead of refusing them
    walk: writes the outputs of the steps that have no function, after all others
    elsewhere: writes the outputs of the steps that have one, in the place of this process's threads

    raises: WtoolError; what was done is kept and continued by the same call
    """
    plan.check()
    check_place(plan, out)
    budget = Budget(memory)
    budget.check(plan.steps)
    fingerprint = plan.fingerprint()
    if out.exists() and not force and is_complete(out, fingerprint):
        return Outcome(out, already_there=True, resumed_bytes=0)
    with Writer(out, plan.shards, fingerprint, force=force) as writer:
        todo = [step for step in plan.steps if step.function and not all(name in writer.done for name in step.outputs)]
        resumed = sum(plan.outputs[name].nbytes for name in writer.done)
        progress(resumed)
        log.debug("%s: %d of %d steps to do, %d bytes there already", out, len(todo), len(plan.steps), resumed)
        if elsewhere is None:
            _announce(plan, todo)
        if walk is None:
            keep_freed_memory()
        if elsewhere is not None:
            elsewhere(writer)
        else:
            run_steps(plan, todo, writer, workers or _useful_workers(todo), allow_nonfinite, progress, budget)
        if walk is not None:
            walk(writer)
        manifest = _manifest(plan, writer, fingerprint)
        writer.commit({**plan.files, MANIFEST: json_bytes(manifest)})
    return Outcome(out, already_there=False, resumed_bytes=resumed)


def _announce(plan: Plan, steps: Sequence[Step]) -> None:
    """Tell each source what will be read of it."""
    reads: list[list[str]] = [[] for _ in plan.sources]
    for step in steps:
        for source, name in step.reads:
            reads[source].append(name)
    for source, names in zip(plan.sources, reads, strict=True):
        source.expect(names)


def run_steps(
    plan: Plan,
    steps: list[Step],
    writer: Writer,
    workers: int,
    allow_nonfinite: bool,
    progress: Progress = lambda nbytes: None,
    budget: Budget | None = None,
) -> None:
    """Carry out steps of a plan that have functions, on some threads."""
    budget = budget or Budget(None)
    queue = iter(enumerate(steps))
    guard = threading.Lock()
    stop = threading.Event()

    def work() -> None:
        finish: Finish | None = None  # of the step before, whose last bytes are written beside this one
        try:
            while not stop.is_set():
                with guard:
                    number, step = next(queue, (0, None))
                if step is None:
                    return
                if number + workers < len(steps):
                    for source, name in steps[number + workers].reads:
                        plan.sources[source].prefetch(name)
                with budget.room(step.nbytes_in_flight):
                    made = _run_step(plan, step, writer, allow_nonfinite)
                finish, before = made, finish
                if before:
                    before()
                progress(step.nbytes_written)
        except BaseException:
            stop.set()
            raise
        finally:
            if finish:
                finish()

    with thread_pool(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()


def _run_step(plan: Plan, step: Step, writer: Writer, allow_nonfinite: bool) -> Finish:
    """Make what a step makes, and put it on its way to the disk."""
    begin = time.perf_counter()
    working_on(next(iter(step.outputs)))
    inputs = [plan.sources[source].read(name) for source, name in step.reads]
    assert step.function is not None
    result = step.function(*inputs)
    told = result if isinstance(result, Told) else None
    made = result.tensors if isinstance(result, Told) else result
    made = made if isinstance(made, tuple) else (made,)
    sums = [_Sum(tensor) for tensor in inputs]
    outputs: dict[str, Placed] = {}
    for name, each in zip(step.outputs, made, strict=True):
        pieces = each if isinstance(each, Pieces) else pieces_of(each)
        placed = outputs[name] = writer.place(name)
        for first, end in pieces.ranges():
            room = placed.room((end - first) * pieces.dtype.itemsize)
            piece = _fill(pieces, first, end - first, room)
            if not allow_nonfinite and (element := first_nonfinite(piece)) is not None:
                raise _nonfinite(plan, step, inputs, name, piece, element, first)
            placed.filled(room)
            for read in sums if len(made) == 1 else ():
                read.go_on(end, pieces.count)
        placed.end()
    ends = [[source, name, each.end()] for (source, name), each in zip(step.reads, sums, strict=True)]
    note = {"inputs": ends, **({"report": told.told()} if told else {})}
    for source, name in step.reads:
        plan.sources[source].forget(name)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: done in %.3f s", ", ".join(step.outputs), time.perf_counter() - begin)
    return partial(_finish, writer, outputs, note)


def _finish(writer: Writer, outputs: Mapping[str, Placed], note: Mapping[str, Any]) -> None:
    """Wait for the disk, and note a step as done."""
    for placed in outputs.values():
        placed.wait()
    writer.note_done({name: placed.digest for name, placed in outputs.items()}, note)


def _fill(made: Pieces, first: int, count: int, room: NDArray[np.uint8]) -> torch.Tensor:
    """Make a piece in its room."""
    memory = torch.from_numpy(room)
    if memory.data_ptr() % made.dtype.itemsize:  # after a tensor of another type
        piece = made.some(first, first + count, made.dtype)
        memory.copy_(piece.view(torch.uint8))
        return piece
    piece = memory.view(made.dtype)
    made.fill(first, piece)
    return piece


class _Sum:
    """The checksum of an input, taken piece by piece as they are read, when they are in the processor's cache."""

    def __init__(self, tensor: torch.Tensor):
        self._count = tensor.numel()
        self._bytes = tensor_bytes(tensor.contiguous())
        self._done = 0
        self._sum = xxhash.xxh3_128()

    def go_on(self, end: int, count: int) -> None:
        """A step has come to one of so many elements; if the input has as many, it has been read to there."""
        if count == self._count:
            self._to(end * (len(self._bytes) // count))

    def end(self) -> str:
        self._to(len(self._bytes))
        return self._sum.hexdigest()

    def _to(self, end: int) -> None:
        self._sum.update(self._bytes[self._done : end])
        self._done = end


def _nonfinite(
    plan: Plan, step: Step, inputs: list[torch.Tensor], name: str, piece: torch.Tensor, element: int, first: int
) -> RuntimeProblem:
    """element: of the piece, which begins with the `first` of the result"""
    cure = "--allow-nonfinite writes it as it is"
    for (source, read), tensor in zip(step.reads, inputs, strict=True):
        if (where := first_nonfinite(tensor)) is not None:
            value = tensor.reshape(-1)[where].item()
            return RuntimeProblem(
                f"{plan.sources[source].label}: tensor '{read}' has {value} at element {where}; {cure}"
            )
    value = piece.reshape(-1)[element].item()
    dtype = str(piece.dtype).removeprefix("torch.")
    return RuntimeProblem(
        f"tensor '{name}': the result is {value} at element {first + element} in {dtype} though all inputs are finite "
        f"(weights that cancel, or values beyond {dtype}); {cure}"
    )


def _manifest(plan: Plan, writer: Writer, fingerprint: str) -> dict[str, Any]:
    """What was made of what: the same inputs and recipe give the same manifest, to the byte."""
    read: list[dict[str, str]] = [{} for _ in plan.sources]
    report: dict[str, Any] = {}
    for note in writer.notes:
        report |= note.get("report", {})
        for source, name, digest in note["inputs"]:
            read[source][name] = digest
    inputs = [
        {
            "checkpoint": source.label,
            **({"revision": source.revision} if source.revision else {}),
            "files": {file.name: {"size": file.size, "header_sha256": file.header} for file in source.identity()},
            "tensors_read": len(read[i]),
            # of "name digest" lines in the order of names: the same weights give the same digest in any shards
            "weights_xxh3": checksum("\n".join(f"{name} {read[i][name]}" for name in sorted(read[i])).encode()),
        }
        for i, source in enumerate(plan.sources)
    ]
    return {
        "wtool": __version__,
        "fingerprint": fingerprint,
        "recipe": plan.recipe,
        "inputs": inputs,
        **plan.about,
        **({"report": dict(sorted(report.items()))} if report else {}),
        "tensors_xxh3": {name: writer.done[name] for name in plan.outputs},
    }
