"""GPTQ on the walk: what is done where the walk stops, and what is written when a block is through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wtool.calibrate import Site
from wtool.grid import Quantized
from wtool.network import Block, Linear, Network, Read
from wtool.writer import Writer, checksum

from .gptq import Outcome
from .matrix import explain, quantize, rounded, split
from .planner import QuantPlan
from .recipe import QuantRecipe


@dataclass
class Quantizing:
    """The visitor of a walk that quantizes each linear and writes each block."""

    recipe: QuantRecipe
    plan: QuantPlan
    network: Network
    writer: Writer
    ready: dict[str, Quantized] = field(default_factory=dict)  # of the block being done, by tensor
    report: dict[str, Any] = field(default_factory=dict)  # of the same, by module

    def __post_init__(self) -> None:
        self._written = frozenset(self.writer.done)  # by an earlier run

    def written(self, block: Block) -> Read | None:
        layers = [self.plan.layers[linear.name] for linear in block.linears if linear.name in self.plan.layers]
        if any(not layer.outputs.keys() <= self._written for layer in layers):
            return None
        return self._read_written

    def site(self, site: Site) -> Mapping[Linear, Tensor]:
        tokens, dropped = site.gram.tokens, site.gram.dropped
        gram = site.gram.finish()
        values: dict[Linear, Tensor] = {}
        for alike in _alike(self.plan, site.linears):
            layer = self.plan.layers[alike[0].name]
            weights = [self.network.view(linear) for linear in alike]
            outcome = quantize(torch.cat(weights), gram, tokens, layer, self.recipe)
            pieces = split(outcome.quantized, [len(weight) for weight in weights])
            for linear, weight, quantized in zip(alike, weights, pieces, strict=True):
                value = quantized.values()
                self._keep(linear, quantized, explain(weight, value, gram, outcome, layer, tokens, dropped))
                values[linear] = value
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
                self._keep(linear, quantized, explain(weight, values[linear], None, outcome, layer, 0, 0))
        for linear in block.linears:
            if linear.name in self.ready:
                self.write(linear.name)
        return values

    def write(self, name: str) -> None:
        """Hand a layer to the writer, but for what an earlier run wrote of it."""
        layer = self.plan.layers[name]
        tensors = layer.format.encode(self.ready.pop(name), layer.scheme)
        named = {f"{layer.linear.module}.{suffix}": tensor.cpu() for suffix, tensor in tensors.items()}
        fresh = {output: tensor for output, tensor in named.items() if output not in self.writer.done}
        note = {
            "inputs": [[0, name, checksum(self.network.checkpoint.read(name).contiguous())]],
            "report": {layer.linear.module: self.report.pop(name)},
        }
        if fresh:
            self.writer.write(fresh, note=note)

    def round_rest(self) -> None:
        """Round the planned layers that the walk does not come to."""
        walked = {linear.name for block in self.network.blocks for linear in block.linears}
        for name, layer in self.plan.layers.items():
            if name not in walked and not layer.outputs.keys() <= self.writer.done.keys():
                weight = self.network.read(name).float()
                weight = weight.T if layer.linear.transposed else weight
                quantized = rounded(weight, layer, self.recipe)
                reason = "transformers does not multiply by it in a block of the model"
                outcome = Outcome(quantized, None, reason, 0)
                self.ready[name] = quantized
                self.report[name] = explain(weight, quantized.values(), None, outcome, layer, 0, 0)
                self.write(name)

    def _keep(self, linear: Linear, quantized: Quantized, report: dict[str, Any]) -> None:
        self.ready[linear.name] = quantized
        self.report[linear.name] = report

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
