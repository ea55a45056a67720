"""The walk of several models side by side, which gathers what RegMean and RegMean++ solve for.

Block by block, every model's text goes through the model's own block for the Gram matrices of its linears; then the
block's linears are merged and written.

    regmean     each text goes on with what the model's own block makes of it
    regmean++   each text goes on through the merged block, and starts from the merged embedding: so the inputs of a
                model's layer are those that the layers before it, merged, hand on, as they will when the merge is used
                (Nguyen, Huu-Tien, Suzuki and Nguyen, "RegMean++: Enhancing Effectiveness and Generalization of
                Regression Mean for Model Merging", 2025, https://arxiv.org/abs/2508.03121). Inside the layer they go
                through the model's own linears.

In memory are one block of one model, the Gram matrices of one block for every model, and the activations of all texts.
A walk that was stopped goes on after the blocks that are written, which are run and not merged again.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wtool.block_pass import Call, Forward, HiddenStates, Site, Sites, Visitor, gathered_inputs, observe
from wtool.calibrate import Progress, Where, batches_of, first_inputs, hidden_states, working_dtype
from wtool.calibration_data import Windows
from wtool.checkpoint import Checkpoint
from wtool.errors import RuntimeProblem
from wtool.finite import first_nonfinite
from wtool.memory import give_back_freed_memory, give_back_large_blocks
from wtool.network import Block, Linear, Network, Read
from wtool.statistics import Gram
from wtool.writer import Writer, checksum

from .planner import RegMeanPlan, groups, merged_group
from .recipe import RegMeanRecipe


class _Output(Network):
    """The merged model, as far as it is written; the rest is the first model's."""

    def __init__(self, checkpoint: Checkpoint, writer: Writer, **settings: Any):
        super().__init__(checkpoint, **settings)
        self._writer = writer
        self._last: tuple[str, Tensor] | None = None  # the embedding is asked for by every batch

    def read(self, name: str) -> Tensor:
        if name not in self._writer.done:
            return super().read(name)
        if self._last is None or self._last[0] != name:
            self._last = (name, self._writer.read(name))
        return self._last[1]


@dataclass
class _Gathering(Visitor[Gram]):
    """What is gathered of one block of one model."""

    wanted: Collection[str]
    grams: dict[str, Tensor] = field(default_factory=dict)  # by the first of the linears that share the input
    first: dict[str, str] = field(default_factory=dict)  # linear -> the name that its input's matrix has

    def written(self, block: Block) -> Read | None:
        return None

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> Gram | None:
        return Gram(features, device) if any(linear.name in self.wanted for linear in linears) else None

    def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
        if site.gathered.tokens:
            name = site.linears[0].name
            self.grams[name] = site.gathered.finish()
            self.first |= {linear.name: name for linear in site.linears}
        return {}

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        return {}


@dataclass(frozen=True)
class _Stream:
    """A model and its text on the way through the blocks."""

    network: Network
    calls: list[list[Call]]  # [batch][block]
    hidden: HiddenStates
    sites: Sites
    progress: Progress

    def forward(self, network: Network, index: int, visitor: _Gathering) -> Forward:
        """A block of this model, or of the merged one, on this text."""
        calls = [call[index] for call in self.calls]
        return Forward(network, network.blocks[index], calls, self.hidden, visitor, self.progress)

    def pass_through(self, network: Network, index: int) -> None:
        self.forward(network, index, _Gathering(())).plain()


def walk_models(
    recipe: RegMeanRecipe,
    planned: RegMeanPlan,
    windows: Sequence[Windows],
    writer: Writer,
    where: Where,
    start: Callable[[int], Progress],
) -> None:
    """Merge and write the linear layers of a plan; all else is written.

    windows: one a model
    raises: InputError, RuntimeProblem
    """
    sources = [planned.plan.sources[source] for source, _ in next(iter(planned.reads.values()))]
    settings: dict[str, Any] = {
        "dtype": where.dtype or working_dtype(sources[0], where.device),
        "device": where.device,
        "trust_remote_code": where.trust_remote_code,
    }
    merged = _Output(sources[0], writer, **settings) if recipe.merge_method == "regmean++" else None
    networks = [Network(source, **settings) for source in sources]
    texts = [batches_of(each.unpadded(), where.batch_tokens) for each in windows]
    progress = start(sum(map(len, texts)) * len(networks[0].blocks))
    before = frozenset(writer.done)
    give_back_large_blocks()
    with torch.inference_mode(), ExitStack() as stack:
        streams: list[_Stream] = []
        for network, batches in zip(networks, texts, strict=True):
            hidden = stack.enter_context(hidden_states(where.activations, network.device))
            calls = first_inputs(merged or network, batches, hidden)
            streams.append(_Stream(network, calls, hidden, Sites(), progress))
        walked = _Walk(recipe, planned, writer, before, streams, merged)
        for block in networks[0].blocks:
            walked.block(block)
            give_back_freed_memory()
    walked.finish()


@dataclass
class _Walk:
    recipe: RegMeanRecipe
    planned: RegMeanPlan
    writer: Writer
    before: Collection[str]  # written by an earlier run
    streams: Sequence[_Stream]
    merged: _Output | None

    def block(self, block: Block) -> None:
        """Merge a block, and take the texts to the next one."""
        names = [linear.name for linear in block.linears if linear.name in self.planned.layers]
        fresh = any(name not in self.before for name in names)
        if fresh:
            self._merge(names, [self._gathered(stream, block.index, names) for stream in self.streams])
        elif self.merged is None:
            for stream in self.streams:
                with stream.network.filled(stream.network.blocks[block.index]):
                    stream.pass_through(stream.network, block.index)
        if self.merged is not None:
            with self.merged.filled(self.merged.blocks[block.index]):
                for stream in self.streams:
                    stream.pass_through(self.merged, block.index)

    def finish(self) -> None:
        """Write the mean of what the walk did not come to."""
        left = [name for name in self.planned.layers if name not in self.writer.done]
        self._merge(left, [_Gathering(()) for _ in self.streams])

    def _gathered(self, stream: _Stream, index: int, names: Sequence[str]) -> _Gathering:
        """Run a model's own block on its text; with regmean++ the text stays before the block."""
        own = stream.network.blocks[index]
        visitor = _Gathering(frozenset(names))
        with stream.network.filled(own):
            forward = stream.forward(stream.network, index, visitor)
            if self.merged is None:
                observe(forward, stream.sites)
            else:
                for site in gathered_inputs(forward, stream.sites).sites():
                    visitor.site(site)
        return visitor

    def _merge(self, names: Sequence[str], found: Sequence[_Gathering]) -> None:
        """Merge linears and write them, those that share an input together."""
        alike = groups(names, [each.first for each in found], self.planned.layers)
        for key, group in alike.items():
            grams = [each.grams[name] if name else None for each, name in zip(found, key, strict=False)]
            stored = [[self._read(*pair) for pair in self.planned.reads[name]] for name in group]
            layers = [self.planned.layers[name] for name in group]
            tensors, report = merged_group(self.recipe, layers, stored, grams)
            for name, tensor, inputs in zip(group, tensors, stored, strict=True):
                self._write(name, tensor, inputs, report[self.planned.layers[name].module])

    def _read(self, source: int, name: str) -> Tensor:
        checkpoint = self.planned.plan.sources[source]
        tensor = checkpoint.read(name)
        if (element := first_nonfinite(tensor)) is not None:
            value = tensor.reshape(-1)[element].item()
            raise RuntimeProblem(f"{checkpoint.label}: tensor '{name}' has {value} at element {element}")
        return tensor

    def _write(self, name: str, tensor: Tensor, inputs: Sequence[Tensor], report: Mapping[str, Any]) -> None:
        """Hand a matrix to the writer, unless an earlier run wrote it."""
        if name in self.writer.done:
            return
        reads = self.planned.reads[name]
        sums = [
            [source, own, checksum(stored.contiguous())] for (source, own), stored in zip(reads, inputs, strict=True)
        ]
        module = self.planned.layers[name].module
        self.writer.write({name: tensor}, note={"inputs": sums, "report": {module: dict(report)}})
        for source, own in reads:
            self.planned.plan.sources[source].forget(own)
