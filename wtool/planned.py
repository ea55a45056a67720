"""What a plan would write, as a checkpoint: its tensors are computed when they are read.

So a result can be evaluated before it is written, or without ever being written, and what is evaluated is what a run
of the plan writes, to the bit: the same functions, and the same rounding to the output's type.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wtool.checkpoint.base import Checkpoint, FileIdentity
from wtool.errors import UsageError
from wtool.plan import Plan, Told

if TYPE_CHECKING:
    import torch

CONFIG, CARD = "config.json", "README.md"


@contextmanager
def planned(plan: Plan, label: str) -> Iterator["Planned"]:
    """A plan as a checkpoint, for a while: files whose content is made up lie in a temporary folder.

    raises: UsageError for a plan with a walk, Mismatch for one that cannot be carried out
    """
    plan.check()
    if any(step.function is None for step in plan.steps):
        raise UsageError(f"{label}: comes out of a walk through the model; it cannot be read before it is written")
    if not any(isinstance(content, bytes) for name, content in plan.files.items() if name not in (CONFIG, CARD)):
        yield Planned(plan, label, None)
        return
    with tempfile.TemporaryDirectory(prefix="wtool-planned-") as folder:
        yield Planned(plan, label, Path(folder))


class Planned(Checkpoint):
    """The output of a plan that has not been carried out.

    folder: an empty one, for files whose content the plan tells; None where there are none
    """

    def __init__(self, plan: Plan, label: str, folder: Path | None):
        self.label = label
        self.tensors = plan.outputs
        self._plan = plan
        self._step = {name: step for step in plan.steps for name in step.outputs}
        config = plan.files.get(CONFIG, b"{}")
        self.config = json.loads(config.read_bytes() if isinstance(config, Path) else config)
        self.files = {
            name: content if isinstance(content, Path) else _written(folder, name, content)
            for name, content in plan.files.items()
            if name not in (CONFIG, CARD)
        }

    def read(self, name: str) -> "torch.Tensor":
        """The tensor; what else its step makes is forgotten."""
        from wtool.pieces import whole

        if name not in self._step:
            raise self.missing(name)
        step = self._step[name]
        inputs = [self._plan.sources[source].read(read) for source, read in step.reads]
        assert step.function is not None
        result = step.function(*inputs)
        tensors = result.tensors if isinstance(result, Told) else result
        for source, read in step.reads:
            self._plan.sources[source].forget(read)
        return whole(tensors[list(step.outputs).index(name)] if isinstance(tensors, tuple) else tensors)

    def identity(self) -> list[FileIdentity]:
        return [file for source in self._plan.sources for file in source.identity()]

    def folders(self) -> list[Path]:
        return [folder for source in self._plan.sources for folder in source.folders()]


def _written(folder: Path | None, name: str, content: bytes) -> Path:
    assert folder is not None
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
