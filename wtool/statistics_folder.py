"""Statistics on disk: what `wtool calibrate` gathers once, and any method starts from.

    OUT/
        block-00000.safetensors …   the Gram matrix of every input in the block, by the first linear that takes it;
                                    float32 [in, in], the mean of x xᵀ over tokens
        gradients.safetensors       where asked for: the mean squared gradient by each output of each linear, float32
                                    [out] (`wtool.output_gradients`)
        wtool.json                  the model, the calibration text, and for each input its linears and tokens

While the walk goes on the files are in a hidden folder beside the output, each put there whole, so a walk that was
stopped goes on after the last of them.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool import __version__
from wtool.checkpoint import Checkpoint
from wtool.checkpoint.folder import Folder
from wtool.checkpoint.safetensors import SafetensorsFile
from wtool.errors import MalformedFile, Mismatch, MissingInput, OutputExists, UnfinishedWork
from wtool.shards import json_bytes
from wtool.writer import MANIFEST, disk_errors, take_lock, work_folder

if TYPE_CHECKING:
    import torch


GRADIENTS = ".squared_gradients"  # after the name of a linear's tensor


@dataclass(frozen=True)
class Input:
    """An input that some linears share."""

    linears: tuple[str, ...]  # their tensors; the first names the Gram matrix
    tokens: int
    dropped: int  # tokens left out because a value was not finite


class StatisticsWriter:
    """Writes the statistics of a model block by block; use it as a context manager, and end with `commit`.

    raises: OutputExists, UnfinishedWork
    """

    def __init__(self, out: Path, fingerprint: str, *, force: bool = False):
        self.out, self.fingerprint = out, fingerprint
        self.work = work_folder(out)
        if out.exists() and (not force or not out.is_dir()):
            raise OutputExists(f"{out}: there already{'' if out.is_file() else '; --force replaces it'}")
        with disk_errors(out):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.work, out)
            self._prepare(force)

    def __enter__(self) -> "StatisticsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def has(self, block: int) -> bool:
        """Whether a block was written by an earlier run."""
        return (self.work / "output" / _name(block)).is_file()

    def put(self, block: int, grams: "Mapping[Input, torch.Tensor]") -> None:
        """Write a block's matrices, whole or not at all."""
        from safetensors.torch import save_file

        entries = [
            {"linears": each.linears, "tokens": each.tokens, "dropped": each.dropped}
            for each in sorted(grams, key=lambda each: each.linears)
        ]
        with disk_errors(self.out):
            half = self.work / "half"
            tensors = {each.linears[0]: grams[each].cpu() for each in grams}
            save_file(tensors, half, {"inputs": json.dumps(entries)})
            half.rename(self.work / "output" / _name(block))

    def put_gradients(self, gradients: "Mapping[str, torch.Tensor]") -> None:
        """Write the mean squared gradients, by the linears' tensors."""
        from safetensors.torch import save_file

        with disk_errors(self.out):
            half = self.work / "half"
            save_file({f"{name}{GRADIENTS}": value.contiguous() for name, value in gradients.items()}, half)
            half.rename(self.work / "output" / "gradients.safetensors")

    @property
    def has_gradients(self) -> bool:
        """Whether they were written by an earlier run."""
        return (self.work / "output" / "gradients.safetensors").is_file()

    def commit(self, blocks: int, about: Mapping[str, Any]) -> None:
        """Let the folder appear under its name."""
        folder = self.work / "output"
        inputs = [entry for block in range(blocks) for entry in _entries(folder / _name(block))]
        manifest = {"wtool": __version__, "fingerprint": self.fingerprint, **about, "statistics": inputs}
        with disk_errors(self.out):
            (folder / MANIFEST).write_bytes(json_bytes(manifest))
            if self.out.exists():
                shutil.rmtree(self.work / "replaced", ignore_errors=True)
                self.out.rename(self.work / "replaced")
            folder.rename(self.out)
            shutil.rmtree(self.work)

    def _prepare(self, force: bool) -> None:
        label = self.work / "fingerprint"
        if label.is_file() and label.read_text() != self.fingerprint:
            if not force:
                raise UnfinishedWork(f"{self.work}: unfinished work of another calibration; --force discards it")
            shutil.rmtree(self.work / "output", ignore_errors=True)
        label.write_text(self.fingerprint)
        (self.work / "output").mkdir(exist_ok=True)


@dataclass(frozen=True)
class Statistics:
    """What was gathered of a model."""

    matrices: Checkpoint  # by the first linear that takes the input
    inputs: Mapping[str, Input]  # by each linear's tensor
    manifest: Mapping[str, Any]

    @property
    def lifted(self) -> bool:
        """Whether Gram matrices are of lifted tokens (`wtool.statistics.lifts`)."""
        return bool(self.manifest.get("lifted"))

    def otherwise(self, lifted: bool) -> list[str]:
        """What is to be said where tokens count otherwise than a method would have them, lifted or not."""
        if self.lifted == lifted:
            return []
        if self.lifted:
            return [f"{self.matrices.label}: these statistics are of lifted tokens (`wtool calibrate --lift`)"]
        return [
            f"{self.matrices.label}: these statistics count all tokens alike, with which the result is worse; "
            "`wtool calibrate --lift` gathers those that a run on text takes"
        ]

    def squared_gradients(self, tensor: str) -> "torch.Tensor | None":
        """The mean squared gradient by each output of a linear, [out]; None where it was not gathered."""
        name = f"{tensor}{GRADIENTS}"
        return self.matrices.read(name) if name in self.matrices.tensors else None


def open_statistics(folder: Path) -> Statistics:
    """Open a folder of statistics.

    raises: MissingInput, MalformedFile
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingInput(f"{folder}: no statistics here ({MANIFEST} is missing); `wtool calibrate` makes them")
    manifest = json.loads(path.read_bytes())
    if "statistics" not in manifest:
        raise MalformedFile(f"{path}: not of statistics but of a checkpoint; `wtool calibrate` makes statistics")
    found = [Input(tuple(each["linears"]), each["tokens"], each["dropped"]) for each in manifest["statistics"]]
    files = [SafetensorsFile(file) for file in sorted(folder.glob("*.safetensors"))]
    matrices = Folder(str(folder), folder, files, {}, {})
    return Statistics(matrices, {linear: each for each in found for linear in each.linears}, manifest)


def identity(model: Checkpoint) -> list[list[Any]]:
    """What tells a model's weights from others', wherever they lie."""
    return [[file.name, file.size, file.header] for file in model.identity()]


def check_model(statistics: Statistics, model: Checkpoint) -> None:
    """Raise Mismatch where statistics are of another model."""
    if statistics.manifest.get("model_files") != identity(model):
        label = statistics.manifest.get("model")
        raise Mismatch(
            f"{statistics.matrices.label}: these statistics are of {label}, whose files are not those of {model.label}"
        )


def _name(block: int) -> str:
    return f"block-{block:05}.safetensors"


def _entries(path: Path) -> Sequence[Mapping[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["inputs"])
