"""From a recipe to a plan: which tensors become codes on which grid, which stay, and every problem there is.

This is the only place in the room that knows names. It works from headers, so it takes as long for a model on the Hub
that nobody has downloaded as for one on disk.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint import Checkpoint, TensorInfo
from wtool.dtypes import FLOATS, config_name, parse_float_dtype, torch_dtype
from wtool.errors import UsageError
from wtool.formats import FORMATS, Format, Scheme
from wtool.linear_names import LAYER, LinearLayer, linear_layers, longest_stack, plain_modules
from wtool.plan import DEFAULT_SHARD_BYTES, Plan, Step, Told
from wtool.recipe_parts import unfitting
from wtool.shards import json_bytes
from wtool.statistics_folder import Input, Statistics, check_model, open_statistics
from wtool.work import walk_work

from .card import model_card
from .gptq import Outcome
from .matrix import explain, quantize, rounded, split
from .recipe import METHODS, QuantRecipe
from .rotating import as_it_lies, open_source, rotation_noted, rotation_told, rotation_warnings
from .targets import problems as target_problems
from .targets import unopened

# Layers whose outputs are multiplied with each other: AWQ clips none of them, alone or fused with values.
QUERIES_OR_KEYS = frozenset(
    "q_proj k_proj q_a_proj q_b_proj kv_b_proj query key query_key_value qkv_proj qkv c_attn W_pack Wqkv".split()
)


@dataclass(frozen=True)
class Layer:
    """A linear layer and how it will be stored."""

    linear: LinearLayer
    scheme: Scheme
    format: Format
    scale_dtype: str  # safetensors name

    @property
    def outputs(self) -> dict[str, TensorInfo]:
        """The tensors in the place of its weight."""
        infos = self.format.layout(self.linear.shape, self.scheme, self.scale_dtype)
        return {f"{self.linear.module}.{suffix}": info for suffix, info in infos.items()}

    @property
    def makes_queries_or_keys(self) -> bool:
        return self.linear.module.rpartition(".")[2] in QUERIES_OR_KEYS


@dataclass(frozen=True)
class QuantPlan:
    """What will happen."""

    plan: Plan
    layers: Mapping[str, Layer]  # by their tensor's name
    left: Mapping[str, str]  # matrices that stay as they are, and why

    @property
    def walked(self) -> list[str]:
        """The tensors that are not quantized and yet are written by the walk."""
        packed = {name for layer in self.layers.values() for name in layer.outputs}
        steps = (step for step in self.plan.steps if step.function is None)
        return [name for step in steps for name in step.outputs if name not in packed]


def plan_quantize(
    recipe: QuantRecipe,
    *,
    headers_only: bool = False,
    low_disk: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> QuantPlan:
    """Make the plan of a quantization.

    headers_only: a model on the Hub is not downloaded; the plan can be shown and not run
    low_disk: a folder to keep the shards of a model on the Hub in while they are read, instead of the cache

    raises: UsageError, InputError where there is nothing to plan on; else `Plan.problems` tells
    """
    source = open_source(recipe, headers_only=headers_only, low_disk=low_disk)
    found, left = linear_layers(source)
    layers, ignored = _layers(recipe, source, found)
    if not layers:
        raise UsageError(f"{source.label}: no linear layer is left to quantize ({len(left)} matrices are none)")
    left = {**left, **ignored}
    settings = FORMATS[recipe.format].settings(
        {layer.linear.module: layer.scheme for layer in layers.values()}, plain_modules(source, left)
    )
    statistics = None if recipe.statistics is None else open_statistics(Path(recipe.statistics))
    if statistics is not None:
        check_model(statistics, source)
    steps = _steps(recipe, source, layers, statistics)
    problems = [f"'{tensor}': {reason}" for tensor, reason in _unfit(layers)]
    if not FORMATS[recipe.format].mixed and len({layer.scheme for layer in layers.values()}) > 1:
        problems.append(f"{recipe.format} has one grid for all layers: leave out what asks for others, or ignore those")
    modules = {layer.linear.module: layer for layer in layers.values()}
    problems += target_problems(recipe, modules)
    record = recipe.model_dump(mode="json", exclude_none=True)
    files: dict[str, Any] = {name: path for name, path in source.files.items() if name != "README.md"}
    files["README.md"] = model_card(record, source, [layer.scheme for layer in layers.values()]).encode()
    files |= {name: json_bytes(content) for name, content in FORMATS[recipe.format].files(settings).items()}
    if source.config:
        files["config.json"] = json_bytes(output_config(source, settings, steps))
    plan = Plan(
        sources=(source,) if statistics is None else (source, statistics.matrices),
        steps=tuple(steps),
        files=files,
        recipe={"quantize": record, **rotation_noted(source)},
        problems=problems,
        warnings=[
            *source_warnings(recipe, source),
            *rotation_warnings(source, steps),
            *unopened(recipe, modules),
            *([] if statistics is None or recipe.method == "rtn" else statistics.otherwise(recipe.lifts)),
        ],
        about={"left": left, "summary": _summary(source, steps, layers), **rotation_told(recipe, source)},
        work=_work(recipe, source, steps),
        max_shard_bytes=max_shard_bytes,
    )
    return QuantPlan(plan, layers, left)


def _layers(
    recipe: QuantRecipe, source: Checkpoint, found: Mapping[str, LinearLayer]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers to quantize, and the ones the user wants as they are."""
    form = FORMATS[recipe.format]
    layers: dict[str, Layer] = {}
    ignored: dict[str, str] = {}
    for name, linear in found.items():
        grid = recipe.grid_of(linear.module)
        if grid is None:
            ignored[name] = "ignored, as asked"
        else:
            scale_dtype = form.scale_dtype(stored_dtype(recipe, source.tensors[name]))
            layers[name] = Layer(linear, Scheme(grid, recipe.ordered), form, scale_dtype)
    return layers, ignored


def _steps(
    recipe: QuantRecipe, source: Checkpoint, layers: Mapping[str, Layer], statistics: Statistics | None
) -> list[Step]:
    steps: list[Step] = []
    done: set[str] = set()
    statistics = None if recipe.method == "rtn" else statistics  # which are for the grids alone, if at all
    stack = longest_stack(source.tensors) if METHODS[recipe.method].scaled else None
    for name, info in source.tensors.items():
        layer = layers.get(name)
        if layer is None:
            info = TensorInfo(stored_dtype(recipe, info), info.shape)
            match = LAYER.match(name)
            walked = stack is not None and match is not None and match[1] == stack  # where scales may be folded in
            function = None if walked else partial(as_stored, dtype=torch_dtype(info.dtype))
            steps.append(Step(((0, name),), {name: info}, function))
        elif name not in done:
            together = _together(name, layers, statistics)
            done.update(each.linear.tensor for each in together)
            steps.append(_layer_step(recipe, together, statistics))
    return steps


def _together(name: str, layers: Mapping[str, Layer], statistics: Statistics | None) -> list[Layer]:
    """The layers that are quantized in one step: those that share an input and are stored alike."""
    layer = layers[name]
    if statistics is None or name not in statistics.inputs:
        return [layer]
    alike = [layers[other] for other in statistics.inputs[name].linears if other in layers]
    return [each for each in alike if (each.scheme, each.scale_dtype) == (layer.scheme, layer.scale_dtype)]


def _layer_step(recipe: QuantRecipe, layers: Sequence[Layer], statistics: Statistics | None) -> Step:
    reads = tuple((0, layer.linear.tensor) for layer in layers)
    outputs = {name: info for layer in layers for name, info in layer.outputs.items()}
    if recipe.method == "rtn":
        return Step(reads, outputs, partial(_rounded, recipe=recipe, layer=layers[0], why=None))
    if statistics is None:
        return Step(reads, outputs, None)
    met = statistics.inputs.get(layers[0].linear.tensor)
    if met is None:
        why = "the statistics tell nothing of its input"
        return Step(reads, outputs, partial(_rounded, recipe=recipe, layer=layers[0], why=why))
    function = partial(_from_statistics, recipe=recipe, layers=tuple(layers), met=met)
    return Step((*reads, (1, met.linears[0])), outputs, function)


def stored_dtype(recipe: QuantRecipe, info: TensorInfo) -> str:
    """The type that a tensor, or the scales of one, will have."""
    return parse_float_dtype(recipe.dtype) if recipe.dtype and info.dtype in FLOATS else info.dtype


def as_stored(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _rounded(weight: Tensor, *, recipe: QuantRecipe, layer: Layer, why: str | None) -> Told:
    weight = weight.T if layer.linear.transposed else weight
    quantized = rounded(weight, layer, recipe)
    report = explain(weight, None, Outcome(quantized, None, why, 0), layer, 0, 0)
    tensors = layer.format.encode(quantized, layer.scheme)
    return Told(tuple(tensors.values()), {layer.linear.module: report})


def _from_statistics(*tensors: Tensor, recipe: QuantRecipe, layers: Sequence[Layer], met: Input) -> Told:
    *stored, gram = tensors
    weights = [weight.T if layer.linear.transposed else weight for weight, layer in zip(stored, layers, strict=True)]
    outcome = quantize(torch.cat(weights), gram, met.tokens, layers[0], recipe)
    pieces = split(outcome.quantized, [len(weight) for weight in weights])
    made: list[Tensor] = []
    report: dict[str, Any] = {}
    for weight, layer, quantized in zip(weights, layers, pieces, strict=True):
        made += layer.format.encode(quantized, layer.scheme).values()
        told = explain(weight, gram, replace(outcome, quantized=quantized), layer, met.tokens, met.dropped)
        report[layer.linear.module] = told
    return Told(tuple(made), report)


def _unfit(layers: Mapping[str, Layer]) -> list[tuple[str, str]]:
    found = [(name, layer.format.unfit(layer.linear.shape, layer.scheme)) for name, layer in layers.items()]
    return [(name, reason) for name, reason in found if reason]


def output_config(source: Checkpoint, settings: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key != "_name_or_path"}
    floats: dict[str, int] = {}
    for step in steps:
        for info in step.outputs.values():
            if info.dtype in FLOATS:
                floats[info.dtype] = floats.get(info.dtype, 0) + info.nbytes
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = config_name(max(floats, key=lambda k: floats[k]))
    return {**config, "quantization_config": dict(settings)}


def source_warnings(recipe: QuantRecipe, source: Checkpoint) -> list[str]:
    warnings: list[str] = []
    if source.quantization:
        warnings.append(f"{source.label} is quantized already ({source.quantization}); what it lost stays lost")
    filters = [*recipe.ignore, *(override.filter for override in recipe.overrides)]
    return warnings + unfitting(filters, (name.removesuffix(".weight") for name in source.tensors))


def _work(recipe: QuantRecipe, source: Checkpoint, steps: Sequence[Step]) -> dict[str, Any]:
    """What the walk takes, where there is one."""
    if all(step.function for step in steps):
        return {}
    asked, forwards = recipe.calibration, 1 if recipe.way == "sequential" else 2
    forwards += METHODS[recipe.method].scaled  # one to look
    forwards += METHODS[recipe.method].asymmetric  # of the model as it was
    if METHODS[recipe.method].learned:  # as it was, and as it has become; a gradient takes two forwards more
        forwards = 2 + -(-3 * recipe.iters * min(recipe.batch, asked.samples) // asked.samples)
    return walk_work(source, asked.samples, asked.seqlen, forwards=forwards, fits=True)


def _summary(source: Checkpoint, steps: Sequence[Step], layers: Mapping[str, Layer]) -> dict[str, Any]:
    weights = sum(layer.linear.shape[0] * layer.linear.shape[1] for layer in layers.values())
    packed = sum(info.nbytes for layer in layers.values() for info in layer.outputs.values())
    return {
        "bytes_before": as_it_lies(source).nbytes,
        "bytes_after": sum(info.nbytes for step in steps for info in step.outputs.values()),
        "layers": len(layers),
        "weights": weights,
        "bits_per_weight": round(packed * 8 / weights, 4),
        "schemes": dict(Counter(str(layer.scheme) for layer in layers.values())),
    }
