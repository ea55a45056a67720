"""What will happen, made from headers alone: steps that read named tensors and make named tensors.

A plan can be printed, checked without weights, sent to another machine and refused before anything is read.
`wtool.executors` run one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool import __version__
from wtool.checkpoint.base import Checkpoint, TensorInfo
from wtool.console import human_bytes
from wtool.errors import Mismatch
from wtool.shards import INDEX, Shard, index_of, plan_shards
from wtool.writer import disk_errors

if TYPE_CHECKING:
    import torch

    from wtool.pieces import Pieces

    Made = torch.Tensor | Pieces

DEFAULT_SHARD_BYTES = 5 * 10**9
IN_PIECES = 1 << 25  # bytes that a step holds at most of what it makes in pieces, with what is being written


@dataclass(frozen=True)
class Step:
    """One piece of work: tensors in, tensors out."""

    reads: tuple[tuple[int, str], ...]  # (source, tensor)
    outputs: Mapping[str, TensorInfo]
    # of the tensors read, in their order; None where the outputs come out of a walk through the model
    function: "Callable[..., Made | tuple[Made, ...] | Told] | None"
    scratch: int = 0  # bytes of memory that the function takes beside the outputs, where they are worth counting
    in_pieces: bool = False  # the outputs are made a piece at a time, and never whole in memory

    @property
    def nbytes_written(self) -> int:
        return sum(info.nbytes for info in self.outputs.values())

    @property
    def nbytes_in_flight(self) -> int:
        """What the step holds while it runs; inputs are mapped, not held."""
        held = min(self.nbytes_written, IN_PIECES) if self.in_pieces else self.nbytes_written
        return held + self.scratch


@dataclass(frozen=True)
class Told:
    """What a step made, with what the manifest's report is to tell of it."""

    tensors: "tuple[Made, ...]"
    report: Mapping[str, Any] | Callable[[], Mapping[str, Any]]  # JSON; what is known when the tensors are written

    def told(self) -> Mapping[str, Any]:
        return self.report() if callable(self.report) else self.report


@dataclass(frozen=True)
class Plan:
    """Steps in the order of their outputs on disk, with what stands beside the weights."""

    sources: tuple[Checkpoint, ...]
    steps: tuple[Step, ...]
    files: Mapping[str, bytes | Path]  # beside the weights: name -> content, or the file to copy
    recipe: Mapping[str, Any]  # what was asked, for the manifest (JSON)
    problems: Sequence[str] = ()  # what makes the plan impossible
    warnings: Sequence[str] = ()  # what the user should know
    about: Mapping[str, Any] = field(default_factory=dict)  # what else the manifest tells (JSON)
    work: Mapping[str, Any] = field(default_factory=dict)  # what a walk takes, for a summary: see `wtool.work`
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    layout: Callable[[Mapping[str, TensorInfo], int], list[Shard]] = plan_shards  # outputs to files of another kind

    @cached_property
    def outputs(self) -> dict[str, TensorInfo]:
        return {name: info for step in self.steps for name, info in step.outputs.items()}

    @cached_property
    def shards(self) -> list[Shard]:
        return self.layout(self.outputs, self.max_shard_bytes)

    @cached_property
    def bytes_to_read(self) -> int:
        reads = {read for step in self.steps for read in step.reads}
        return sum(self.sources[source].tensors[name].nbytes for source, name in reads)

    @cached_property
    def bytes_to_write(self) -> int:
        return sum(shard.size for shard in self.shards)

    def peak_bytes(self, workers: int, memory: int | None = None) -> int:
        """An upper bound of the memory of the steps in flight; inputs are mapped, not held."""
        largest = sorted((step.nbytes_in_flight for step in self.steps), reverse=True)
        return min(sum(largest[:workers]), memory or sum(largest))

    def summary(self, workers: int, memory: int | None = None) -> dict[str, Any]:
        """The plan in figures, for scripts."""
        return {
            "recipe": dict(self.recipe),
            "inputs": [source.label for source in self.sources],
            "tensors": len(self.outputs),
            "parameters": sum(info.elements for info in self.outputs.values()),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "shards": len(self.shards),
            "peak_memory_bytes": self.peak_bytes(workers, memory),
            **self.work,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }

    def describe(self, workers: int, memory: int | None = None) -> str:
        """The plan in words."""
        lines = [
            f"{len(self.outputs)} tensors of {len(self.sources)} checkpoints: "
            f"read {human_bytes(self.bytes_to_read)}, write {human_bytes(self.bytes_to_write)} in {len(self.shards)} "
            f"file(s), up to {human_bytes(self.peak_bytes(workers, memory))} of results in memory ({workers} workers)",
            *(f"warning: {warning}" for warning in self.warnings),
            *(f"problem: {problem}" for problem in self.problems),
        ]
        lines.append("this plan cannot be carried out" if self.problems else "no problem found")
        return "\n".join(lines)

    def sketch(self, folder: Path) -> None:
        """Write what the output will look like, all but the numbers, so that what follows can be planned on it."""
        sketch(folder, self.shards, self.files)

    def fingerprint(self) -> str:
        """Tells this work from any other: recipe, inputs, layout of the output, version of the tool."""
        identity = {
            "wtool": __version__,
            "recipe": self.recipe,
            "inputs": [[asdict(file) for file in source.identity()] for source in self.sources],
            "outputs": [[shard.filename, hashlib.sha256(shard.header).hexdigest()] for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()

    def check(self) -> None:
        """Raise Mismatch if the plan cannot be carried out."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more: --dry-run lists them)" if len(self.problems) > 1 else ""
            raise Mismatch(f"{self.problems[0]}{more}")


def sketch(folder: Path, shards: Sequence[Shard], files: Mapping[str, bytes | Path]) -> None:
    """Write a checkpoint without its numbers: headers, and what stands beside the weights; takes no room on the disk.

    raises: OutputError
    """
    with disk_errors(folder):
        folder.mkdir(parents=True)
        for shard in shards:
            with (folder / shard.filename).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        for name, content in {**files, **({INDEX: index_of(shards)} if len(shards) > 1 else {})}.items():
            (folder / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
