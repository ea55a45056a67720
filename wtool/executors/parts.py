"""A plan in parts, one file of the output each, that processes on any machine write side by side.

A part is written as a whole output is (`wtool.writer`): with a lock, a journal, headers first and a rename at the end.
So a part that was begun goes on where it was, and one that has its name is whole and on the disk. All are in `parts/`
in the hidden folder of the output; when all are whole, the files are moved to their places.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.errors import UnfinishedWork
from wtool.executors.local import run_steps
from wtool.plan import Plan, Step, Told
from wtool.shards import Shard, json_bytes
from wtool.writer import MANIFEST, PARTS, Writer, is_complete

if TYPE_CHECKING:
    from torch import Tensor

    from wtool.plan import Made

PATIENCE = 120.0  # seconds to wait for a process that is taken for dead and is not, or whose lock a server still keeps


@dataclass(frozen=True)
class Part:
    """One file of an output, and the steps that make its tensors."""

    shard: Shard
    steps: tuple[Step, ...]  # of their outputs only those in the file

    @property
    def name(self) -> str:
        return Path(self.shard.filename).stem

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.shard.tensors.values())

    def folder(self, work: Path) -> Path:
        """Where it appears when it is whole, in the hidden folder of the output."""
        return work / PARTS / self.name


def parts_of(plan: Plan) -> list[Part]:
    """The parts of a plan, all of whose steps have functions; a step whose outputs lie in two files is in both."""
    number_of = {name: number for number, shard in enumerate(plan.shards) for name in shard.tensors}
    steps: list[list[Step]] = [[] for _ in plan.shards]
    for step in plan.steps:
        assert step.function is not None, "the outputs of a walk are made by one process"
        for number in sorted({number_of[name] for name in step.outputs}):
            steps[number].append(_within(step, plan.shards[number]))
    return [Part(shard, tuple(own)) for shard, own in zip(plan.shards, steps, strict=True)]


def _within(step: Step, shard: Shard) -> Step:
    """A step, of whose outputs only those in one file are kept."""
    kept = tuple(number for number, name in enumerate(step.outputs) if name in shard.tensors)
    if len(kept) == len(step.outputs):
        return step
    outputs = {name: info for name, info in step.outputs.items() if name in shard.tensors}
    return replace(step, outputs=outputs, function=partial(_some, function=step.function, kept=kept))


def _some(*inputs: "Tensor", function: Any, kept: Sequence[int]) -> "tuple[Made, ...] | Told":
    """Some of what a function makes."""
    result = function(*inputs)
    made = result.tensors if isinstance(result, Told) else result
    made = made if isinstance(made, tuple) else (made,)
    some = tuple(made[number] for number in kept)
    return Told(some, result.report) if isinstance(result, Told) else some


def write_part(
    plan: Plan, part: Part, work: Path, fingerprint: str, *, workers: int, allow_nonfinite: bool = False
) -> None:
    """Write one part, or go on with one that was begun; nothing where it is whole.

    work: the hidden folder of the output

    raises: WtoolError
    """
    folder = part.folder(work)
    if is_complete(folder, fingerprint):
        return
    with _writer(folder, part.shard, fingerprint) as writer:
        todo = [step for step in part.steps if not all(name in writer.done for name in step.outputs)]
        run_steps(plan, todo, writer, workers, allow_nonfinite)
        note: dict[str, Any] = {"inputs": [], "report": {}}
        for each in writer.notes:
            note["inputs"] += each["inputs"]
            note["report"] |= each.get("report", {})
        told = {"fingerprint": fingerprint, "done": writer.done, "note": note}
        writer.commit({MANIFEST: json_bytes(told)})


def _writer(folder: Path, shard: Shard, fingerprint: str) -> Writer:
    """The writer of a part, as soon as no other process has it."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return Writer(folder, [shard], fingerprint, force=True)
        except UnfinishedWork:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def take_over(part: Part, writer: Writer) -> None:
    """Move the file of a part that is whole to its place in the output."""
    folder = part.folder(writer.work)
    told = json.loads((folder / MANIFEST).read_bytes())
    writer.adopt(folder / part.shard.filename, told["done"], told["note"])
