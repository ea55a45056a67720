"""GPTQ on the walk: what is done where the walk stops, and what is written when a block is through."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wtool.calibrate import Site, Visitor
from wtool.errors import RuntimeProblem
from wtool.finite import first_nonfinite
from wtool.grid import Quantized
from wtool.network import Block, Linear, Network, Read
from wtool.statistics import Gram
from wtool.writer import Writer, checksum

from .gptq import Outcome
from .matrix import explain, quantize, rounded, split
from .planner import QuantPlan
from .recipe import QuantRecipe


@dataclass
class Quantizing(Visitor[Gram]):
    """The visitor of a walk that quantizes each linear and writes each block."""

    recipe: QuantRecipe
    plan: QuantPlan
    network: Network
    writer: Writer
    ready: dict[str, Quantized] = field(default_factory=dict)  # of the block being done, by tensor
    report: dict[str, Future[dict[str, Any]]] = field(default_factory=dict)  # of the same

    def __post_init__(self) -> None:
        self._written = frozenset(self.writer.done)  # by an earlier run
        # what nothing waits for (the report, packing, writing) is done beside the walk, in this order
        self._beside = ThreadPoolExecutor(1, "wtool-beside", initializer=torch.set_num_threads, initargs=(1,))
        self._writing: list[Future[None]] = []

    def __enter__(self) -> "Quantizing":
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown(cancel_futures=True)

    def written(self, block: Block) -> Read | None:
        layers = [self.plan.layers[linear.name] for linear in block.linears if linear.name in self.plan.layers]
        if any(not layer.outputs.keys() <= self._written for layer in layers):
            return None
        return self._read_written

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> Gram | None:
        planned = any(linear.name in self.plan.layers for linear in linears)
        return Gram(features, device) if planned else None

    def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
        tokens, dropped = site.gathered.tokens, site.gathered.dropped
        gram = site.gathered.finish()
        values: dict[Linear, Tensor] = {}
        for alike in _alike(self.plan, site.linears):
            layer = self.plan.layers[alike[0].name]
            weights = [self.network.view(linear) for linear in alike]
            rows = [len(weight) for weight in weights]
            weight = torch.cat(weights)
            outcome = quantize(weight, gram, tokens, layer, self.recipe)
            for linear, before, quantized in zip(
                alike, weight.split(rows), split(outcome.quantized, rows), strict=True
            ):
                values[linear] = value = quantized.values()
                self._keep(linear, quantized, before, value, gram, outcome, tokens, dropped)
        return values

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        values: dict[Linear, Tensor] = {}
        for linear in unseen:
            if linear.name in self.plan.layers:
                layer = self.plan.layers[linear.name]
                weight = self.network.view(linear)
                quantized = rounded(weight, layer, self.recipe)
                outcome = Outcome(quantized, None, "no token came to it", weight.shape[1])
                values[linear] = quantized.values()
                self._keep(linear, quantized, weight.clone(), values[linear], None, outcome, 0, 0)
        self._wait()
        ready = [linear.name for linear in block.linears if linear.name in self.ready]
        self._writing = [self._beside.submit(self.write, name) for name in ready]
        return values

    def finish(self) -> None:
        """Round the planned layers that the walk does not come to, and wait until all is written."""
        self._wait()
        self._round_rest()

    def write(self, name: str) -> None:
        """Hand a layer to the writer, but for what an earlier run wrote of it."""
        layer = self.plan.layers[name]
        tensors = layer.format.encode(self.ready.pop(name), layer.scheme)
        named = {f"{layer.linear.module}.{suffix}": tensor.cpu() for suffix, tensor in tensors.items()}
        fresh = {output: tensor for output, tensor in named.items() if output not in self.writer.done}
        stored = self.network.read(name).contiguous()
        if (element := first_nonfinite(stored)) is not None:
            value = stored.reshape(-1)[element].item()
            raise RuntimeProblem(
                f"{self.network.checkpoint.label}: tensor '{name}' has {value} at element {element}; "
                "--ignore leaves a module as it is"
            )
        note = {
            "inputs": [[0, name, checksum(stored)]],
            "report": {layer.linear.module: self.report.pop(name).result()},
        }
        if fresh:
            self.writer.write(fresh, note=note)

    def _round_rest(self) -> None:
        walked = {linear.name for block in self.network.blocks for linear in block.linears}
        for name, layer in self.plan.layers.items():
            if name not in walked and not layer.outputs.keys() <= self.writer.done.keys():
                weight = self.network.read(name).float()
                weight = weight.T if layer.linear.transposed else weight
                quantized = rounded(weight, layer, self.recipe)
                reason = "transformers does not multiply by it in a block of the model"
                outcome = Outcome(quantized, None, reason, 0)
                self.ready[name] = quantized
                values = quantized.values()
                self.report[name] = self._beside.submit(explain, weight, values, None, outcome, layer, 0, 0)
                self.write(name)

    def _keep(
        self,
        linear: Linear,
        quantized: Quantized,
        before: Tensor,
        after: Tensor,
        gram: Tensor | None,
        outcome: Outcome,
        tokens: int,
        dropped: int,
    ) -> None:
        layer = self.plan.layers[linear.name]
        self.ready[linear.name] = quantized
        told = self._beside.submit(explain, before, after, gram, outcome, layer, tokens, dropped)
        self.report[linear.name] = told

    def _wait(self) -> None:
        for writing in self._writing:
            writing.result()

    def _read_written(self, name: str) -> Tensor:
        """A tensor of a finished block: the linears as they were written."""
        if name not in self.plan.layers:
            return self.network.read(name)
        layer = self.plan.layers[name]
        prefix = f"{layer.linear.module}."
        tensors = {output.removeprefix(prefix): self.writer.read(output) for output in layer.outputs}
        values = layer.format.decode(tensors, layer.scheme, layer.linear.shape).values()
        return values.T if layer.linear.transposed else values


def _alike(plan: QuantPlan, linears: Sequence[Linear]) -> list[list[Linear]]:
    """The planned ones of some linears, those that are stored alike together."""
    groups: dict[Any, list[Linear]] = {}
    for linear in linears:
        if linear.name in plan.layers:
            layer = plan.layers[linear.name]
            groups.setdefault((layer.scheme, layer.scale_dtype), []).append(linear)
    return list(groups.values())
