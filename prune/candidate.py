"""A model that a cut would leave, read through the cut, so that it can be tried before it is written."""

from pathlib import Path
from typing import TYPE_CHECKING

from wtool.checkpoint.base import Checkpoint, FileIdentity

from .cut import cut
from .structure import Kept

if TYPE_CHECKING:
    import torch


class Candidate(Checkpoint):
    """A view of a checkpoint as it would be after a cut."""

    def __init__(self, source: Checkpoint, kept: Kept):
        self.label, self.revision, self.files = source.label, source.revision, source.files
        steps, self.config = cut(source, kept)
        self._steps = {name: step for step in steps for name in step.outputs}
        self.tensors = {name: step.outputs[name] for name, step in self._steps.items()}
        self._source = source

    def read(self, name: str) -> "torch.Tensor":
        if name not in self._steps:
            raise self.missing(name)
        step = self._steps[name]
        ((_, origin),) = step.reads
        assert step.function is not None
        tensor = step.function(self._source.read(origin))
        assert not isinstance(tensor, tuple) and hasattr(tensor, "shape"), "a cut gives one tensor"
        return tensor  # pyright: ignore[reportReturnType]

    def forget(self, name: str) -> None:
        ((_, origin),) = self._steps[name].reads
        self._source.forget(origin)

    def identity(self) -> list[FileIdentity]:
        return self._source.identity()

    def folders(self) -> list[Path]:
        return self._source.folders()
