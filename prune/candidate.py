"""A model that a cut would leave, read through the cut, so that it can be tried before it is written."""

from typing import TYPE_CHECKING

from wtool.checkpoint.base import Checkpoint, View

from .cut import cut
from .structure import Kept

if TYPE_CHECKING:
    import torch


class Candidate(View):
    """A view of a checkpoint as it would be after a cut."""

    def __init__(self, source: Checkpoint, kept: Kept):
        super().__init__(source)
        steps, self.config = cut(source, kept)
        self._steps = {name: step for step in steps for name in step.outputs}
        self.tensors = {name: step.outputs[name] for name, step in self._steps.items()}

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(origin for _, origin in self._steps[name].reads)

    def read(self, name: str) -> "torch.Tensor":
        if name not in self._steps:
            raise self.missing(name)
        step = self._steps[name]
        (origin,) = self.parts(name)
        assert step.function is not None
        tensor = step.function(self.source.read(origin))
        assert not isinstance(tensor, tuple) and hasattr(tensor, "shape"), "a cut gives one tensor"
        return tensor  # pyright: ignore[reportReturnType]
