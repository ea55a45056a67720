"""What a runtime cannot load, told before any work is done: the layer and the rule.

The rules are those of transformers 5 with compressed-tensors 0.20, vLLM (0.19 and newer), GPTQModel 7.7 and
AutoGPTQ 0.7.1.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from wtool.formats import Scheme, Shape
from wtool.formats.fp8 import Fp8
from wtool.formats.scheme import EXPERTS
from wtool.grid import Grid
from wtool.linear_names import LinearLayer

from .recipe import QuantRecipe

if TYPE_CHECKING:
    from .planner import Layer

NO_CONV1D = "is a Conv1D, and transformers opens a quantized one with random weights or not at all"
ONE_FOR_EXPERTS = "is an expert of another grid than the first, by which transformers decodes all, and says nothing"
NO_ZEROS_IN_EXPERTS = "is an expert with zeros, and transformers does not open these (--symmetric)"
NO_ZEROS_IN_SEVERAL = "has zeros, and transformers does not open these where layers have several grids (--symmetric)"

# Layers that runtimes compute as one, so that they must be stored alike.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))


def problems(recipe: QuantRecipe, layers: "Mapping[str, Layer]") -> list[str]:
    """Tell what stands against the recipe's target, a line each; layers go by their modules' names."""
    if recipe.target is None:
        return []
    form = "gptq" if recipe.format.startswith("gptq") else recipe.format
    if form not in TAKES[recipe.target]:
        return [f"{recipe.target} does not read {recipe.format} (it reads {', '.join(TAKES[recipe.target])})"]
    found = [f"{recipe.target}: '{name}' {rule}" for name, rule in RULES[recipe.target](recipe, layers)]
    return found


def unopened(recipe: QuantRecipe, layers: "Mapping[str, Layer]") -> list[str]:
    """What transformers, which most would try, opens wrongly or not at all: a line for each rule."""
    if recipe.format != "compressed-tensors" or recipe.target is not None:  # of a target, all problems are told
        return []
    first: dict[str, str] = {}
    for name, rule in _unpacked(layers):
        first.setdefault(rule, name)
    return [f"'{name}' {rule}" for rule, name in first.items()]


def unopened_fp8(linears: Iterable[LinearLayer]) -> list[str]:
    """The same of FP8."""
    turned = [linear.module for linear in linears if linear.transposed]
    return [f"'{turned[0]}' {NO_CONV1D}"] if turned else []


def fp8_problems(recipe: QuantRecipe, scheme: Fp8, shapes: Mapping[str, Shape]) -> list[str]:
    """The same for FP8; shapes of layers by their modules' names."""
    target = recipe.target
    if target is None:
        return []
    if target not in ("transformers", "vllm"):
        return [f"{target} does not read FP8 (it reads {', '.join(TAKES[target])})"]
    if scheme.activations != "group":
        return []
    rules = {name: _blocks_of_128(name, shape, target, recipe.tensor_parallel) for name, shape in shapes.items()}
    return [f"{target}: '{name}' {rule} (the scheme fp8-dynamic takes any)" for name, rule in rules.items() if rule]


def _blocks_of_128(name: str, shape: Shape, target: str, parallel: int) -> str | None:
    """Why a runtime cannot compute with a layer in blocks; what it fuses is split by outputs, the rest by inputs."""
    (outputs, inputs), leaf = shape, name.rpartition(".")[2]
    alike = next((names for names in FUSED if leaf in names), ())
    share = f" on each of {parallel} devices" if parallel > 1 else ""
    if inputs % (128 if alike else 128 * parallel):
        return f"has {inputs} inputs, which groups of 128 do not divide{share if not alike else ''}"
    last = bool(alike) and leaf == alike[-1]  # of layers that are computed as one; its end may be part of a block
    if target == "vllm" and alike and outputs % (128 * parallel) and (parallel > 1 or not last):
        return f"has {outputs} outputs, which blocks of 128 do not divide{share}"
    return None


def _vllm(recipe: QuantRecipe, layers: "Mapping[str, Layer]") -> Iterator[tuple[str, str]]:
    parallel = recipe.tensor_parallel
    for name, layer in layers.items():
        grid, inputs = layer.scheme.grid, layer.linear.shape[1]
        if grid.bits not in (4, 8):
            yield name, f"has {grid.bits} bits; it takes 4 and 8"
        if recipe.format == "awq" and grid.symmetric:
            yield name, "is symmetric; of AWQ it takes grids with zeros (--asymmetric)"
        if recipe.format.startswith("gptq") and not grid.symmetric:
            yield name, "is asymmetric; of GPTQ it takes symmetric grids (--format compressed-tensors takes both)"
        if grid.group_size != -1 and inputs % (grid.group_size * parallel):
            share = f" on each of {parallel} devices" if parallel > 1 else ""
            yield name, f"has {inputs} inputs, which groups of {grid.group_size} do not divide{share}"
    yield from _unlike(layers)
    yield from _unlike_experts(layers)


def _transformers(recipe: QuantRecipe, layers: "Mapping[str, Layer]") -> Iterator[tuple[str, str]]:
    if recipe.format.startswith("gptq"):  # it reads them through GPTQModel
        yield from _gptqmodel(recipe, layers)
    if recipe.format == "compressed-tensors":
        yield from _unpacked(layers)


def _unpacked(layers: "Mapping[str, Layer]") -> Iterator[tuple[str, str]]:
    """What transformers 5.24 with compressed-tensors 0.20 does not unpack, or does wrongly."""
    several = len({layer.scheme for layer in layers.values()}) > 1
    of_experts: Scheme | None = None
    for name, layer in layers.items():
        if layer.linear.transposed:
            yield name, NO_CONV1D
        expert = EXPERTS.match(name) is not None
        if not layer.scheme.grid.symmetric and (expert or several):
            yield name, NO_ZEROS_IN_EXPERTS if expert else NO_ZEROS_IN_SEVERAL
        of_experts = layer.scheme if expert and of_experts is None else of_experts
        if expert and layer.scheme != of_experts:
            yield name, ONE_FOR_EXPERTS


def _gptqmodel(recipe: QuantRecipe, layers: "Mapping[str, Layer]") -> Iterator[tuple[str, str]]:
    for name, layer in layers.items():
        outputs, inputs = layer.linear.shape
        if layer.scheme.grid.bits not in (2, 3, 4, 8):
            yield name, f"has {layer.scheme.grid.bits} bits; it takes 2, 3, 4 and 8"
        if outputs % 32 or inputs % 32:
            yield name, f"is {outputs} x {inputs}; both must be multiples of 32"


def _autogptq(recipe: QuantRecipe, layers: "Mapping[str, Layer]") -> Iterator[tuple[str, str]]:
    yield from _gptqmodel(recipe, layers)
    grids = {layer.scheme.grid for layer in layers.values()}
    if len(grids) > 1:
        name = next(name for name, layer in layers.items() if layer.scheme.grid != recipe.grid)
        yield name, "has a grid of its own; it takes one grid for all layers"
    if recipe.format == "gptq_v2":
        yield next(iter(layers)), "is in version 2 of the format; it reads version 1 (--format gptq)"


def _unlike(layers: "Mapping[str, Layer]") -> Iterator[tuple[str, str]]:
    """Layers that are computed as one and stored unlike."""
    for name, layer in layers.items():
        for alike in FUSED:
            if name.rpartition(".")[2] == alike[0]:
                for other in alike[1:]:
                    partner = re.sub(rf"{alike[0]}$", other, name)
                    if _scheme(layers, partner) != layer.scheme:
                        yield name, f"and '{partner}' are computed as one, but are not stored alike"


def _unlike_experts(layers: "Mapping[str, Layer]") -> Iterator[tuple[str, str]]:
    """Experts of one block that are stored unlike."""
    first: dict[str, str] = {}
    for name, layer in layers.items():
        if block := EXPERTS.match(name):
            other = first.setdefault(block[1], name)
            if layer.scheme != layers[other].scheme:
                yield name, f"and '{other}' are experts of one block, but are not stored alike"


def _scheme(layers: "Mapping[str, Layer]", name: str) -> Scheme | Grid | None:
    return layers[name].scheme if name in layers else None


TAKES = {
    "transformers": ("compressed-tensors", "gptq", "awq"),
    "vllm": ("compressed-tensors", "gptq", "awq"),
    "gptqmodel": ("gptq", "awq"),
    "autogptq": ("gptq",),
}
RULES: dict[str, Any] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "gptqmodel": _gptqmodel,
    "autogptq": _autogptq,
}
