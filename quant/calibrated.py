"""GPTQ on the walk: what is made of the linears that share an input."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wtool.grid import Quantized
from wtool.ranks import ALONE, Ranks
from wtool.rewrite import Change, Made
from wtool.statistics import CrossGram, Gram

from .gptq import Outcome
from .matrix import explain, quantize, rounded, split
from .planner import Layer, QuantPlan
from .recipe import METHODS, QuantRecipe
from .rows import by_rows


@dataclass(frozen=True)
class Quantizing(Change[Gram]):
    """Quantizes linears as a plan says."""

    recipe: QuantRecipe
    plan: QuantPlan
    ranks: Ranks = ALONE

    def outputs(self, tensor: str) -> Collection[str]:
        layer = self.plan.layers.get(tensor)
        return () if layer is None else layer.outputs.keys()

    def gather(self, features: int, device: torch.device) -> Gram:
        kind = CrossGram if METHODS[self.recipe.method].asymmetric else Gram
        return kind(features, device, lifted=self.recipe.lifts)

    def site(self, tensors: Sequence[str], weights: Sequence[Tensor], gathered: Gram) -> Sequence[Made]:
        return [made_of(found) for found in self.found(tensors, weights, inputs_of(gathered))]

    def found(self, tensors: Sequence[str], weights: Sequence[Tensor], inputs: "Inputs") -> list["Found"]:
        """What becomes of linears that share an input."""
        found: dict[str, Found] = {}
        weight_of = dict(zip(tensors, weights, strict=True))
        for alike in _alike(self.recipe, self.plan, tensors):
            layer = self.plan.layers[alike[0]]
            weight = weight_of[alike[0]] if len(alike) == 1 else torch.cat([weight_of[name] for name in alike])
            seen = {"gram": inputs.gram, "cross": inputs.cross, "tokens": inputs.tokens}
            work = partial(quantize, **seen, layer=layer, recipe=self.recipe)
            outcome = by_rows(self.ranks, weight, work)
            pieces = split(outcome.quantized, [len(weight_of[name]) for name in alike])
            for name, quantized in zip(alike, pieces, strict=True):
                own = replace(outcome, quantized=quantized)
                found[name] = Found(self.plan.layers[name], own, inputs.gram, inputs.tokens, inputs.dropped)
        return [found[name] for name in tensors]

    def unseen(self, tensor: str, weight: Tensor, why: str) -> Made:
        layer = self.plan.layers[tensor]
        quantized = rounded(weight, layer, self.recipe)
        return made_of(Found(layer, Outcome(quantized, None, why, weight.shape[1]), None, 0, 0))

    def decode(self, tensor: str, written: Mapping[str, Tensor]) -> Tensor:
        layer = self.plan.layers[tensor]
        prefix = f"{layer.linear.module}."
        tensors = {output.removeprefix(prefix): value for output, value in written.items()}
        return layer.format.decode(tensors, layer.scheme, layer.linear.shape).values()


@dataclass(frozen=True)
class Inputs:
    """What is known of the input of a linear."""

    gram: Tensor  # float32 [in, in]
    tokens: int
    dropped: int
    cross: Tensor | None = None  # as `gptq` takes it


def inputs_of(gathered: Gram) -> Inputs:
    tokens, dropped = gathered.tokens, gathered.dropped
    gram, cross = gathered.finish_both() if isinstance(gathered, CrossGram) else (gathered.finish(), None)
    return Inputs(gram, tokens, dropped, cross)


@dataclass(frozen=True)
class Found:
    """A linear quantized, and what was seen of its input."""

    layer: Layer
    outcome: Outcome
    gram: Tensor | None  # float32 [in, in]; None where nothing is known of it
    tokens: int
    dropped: int


def made_of(found: Found) -> Made:
    quantized = found.outcome.quantized
    told = {"gram": found.gram, "outcome": found.outcome, "layer": found.layer}
    explained = partial(explain, **told, tokens=found.tokens, dropped=found.dropped)
    return Made(quantized.values(), partial(_encode, found.layer, quantized), explained)


def _encode(layer: Layer, quantized: Quantized) -> dict[str, Tensor]:
    tensors = layer.format.encode(quantized, layer.scheme)
    return {f"{layer.linear.module}.{suffix}": tensor.cpu() for suffix, tensor in tensors.items()}


def _alike(recipe: QuantRecipe, plan: QuantPlan, tensors: Sequence[str]) -> list[list[str]]:
    """Matrices by how they are rounded and stored, those alike together."""
    groups: dict[Any, list[str]] = {}
    for name in tensors:
        layer = plan.layers[name]
        alone = recipe.method == "awq" and layer.makes_queries_or_keys  # these are not clipped
        groups.setdefault((layer.scheme, layer.scale_dtype, alone), []).append(name)
    return list(groups.values())
