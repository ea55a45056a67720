"""A plan with a walk in several processes (`wtool.ranks`): the first one writes, all walk."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.dtypes import TensorInfo, torch_dtype
from wtool.executors import local
from wtool.executors.local import Outcome
from wtool.plan import Plan
from wtool.ranks import Ranks
from wtool.rewrite import Output
from wtool.writer import Writer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """The output of all: what is read comes from the first process, what others than it write is dropped."""

    ranks: Ranks
    done: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    writer: Writer | None  # of the first process

    def read(self, name: str) -> "Tensor":
        info = self.tensors[name]
        tensor = self.writer.read(name) if self.writer else None
        return self.ranks.copy_of_first(tensor, info.shape, torch_dtype(info.dtype))

    def write(self, tensors: "Mapping[str, Tensor]", note: Mapping[str, Any] | None = None) -> None:
        if self.writer:
            self.writer.write(tensors, note)


def run(plan: Plan, out: Path, *, force: bool, walk: Callable[[Output], None], ranks: Ranks) -> Outcome:
    """Carry out a plan, or go on with one that was stopped; all processes call it.

    walk: writes the outputs of the steps that have no function

    raises: WtoolError; what was done is kept and continued by the same call
    """
    if ranks.size == 1:
        return local.run(plan, out, force=force, walk=walk)
    if ranks.leads:

        def first(writer: Writer) -> None:
            ranks.from_first(dict(writer.done))
            walk(Shared(ranks, writer.done, plan.outputs, writer))

        return ranks.from_first(local.run(plan, out, force=force, walk=first))
    told: Any = ranks.from_first(None)  # what is done already, or how it all ended
    if isinstance(told, Outcome):
        return told
    walk(Shared(ranks, told, plan.outputs, None))
    return ranks.from_first(None)
