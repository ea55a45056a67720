"""From a recipe to a plan, for prunings that change matrices one by one; `structural` makes the others'.

It works from headers alone. Where shares or ranks of matrices depend on calibration, the plan of a dry run has those
that they are on average.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.errors import UsageError
from wtool.finite import refuse_nonfinite
from wtool.formats import bitmask, low_rank
from wtool.linear_names import plain_modules
from wtool.plan import DEFAULT_SHARD_BYTES, Plan, Step, Told
from wtool.recipe_parts import unfitting
from wtool.shards import json_bytes
from wtool.statistics_folder import Input, Statistics, check_model, open_statistics
from wtool.work import walk_work

from .card import model_card
from .layers import CODES, Layer, layers_to_prune
from .matrix import Fed, explain, of_gram
from .pattern import dense_tail
from .recipe import METHODS, PruneRecipe
from .sparsifying import prune


@dataclass(frozen=True)
class PrunePlan:
    """What will happen."""

    plan: Plan
    layers: Mapping[str, Layer]  # by their tensors
    left: Mapping[str, str]  # matrices that stay as they are, and why


@dataclass(frozen=True)
class Found:
    """What calibration told of how much each matrix can lose; None where nothing had to be asked."""

    shares: Mapping[str, float] | None = None  # of the weights to drop
    ranks: Mapping[str, int | None] | None = None
    about: Mapping[str, Any] | None = None  # for the manifest


NOTHING = Found()


def open_source(
    recipe: PruneRecipe, *, headers_only: bool = False, low_disk: Path | None = None
) -> tuple[Checkpoint, Statistics | None]:
    """The checkpoint to prune, and the statistics to start from, if they are given.

    raises: InputError
    """
    source = open_checkpoint(recipe.model, headers_only=headers_only, low_disk=low_disk)
    if recipe.statistics is None:
        return source, None
    statistics = open_statistics(Path(recipe.statistics))
    check_model(statistics, source)
    return source, statistics


def plan_matrices(
    recipe: PruneRecipe,
    source: Checkpoint,
    statistics: Statistics | None,
    found: Found = NOTHING,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> PrunePlan:
    """Make the plan of a pruning by a method.

    raises: UsageError where there is nothing to prune
    """
    layers, left = layers_to_prune(recipe, source, found.shares, found.ranks)
    if not layers:
        raise UsageError(f"{source.label}: no linear layer is left to prune ({len(left)} matrices are none)")
    steps = [_step(recipe, source, name, layers.get(name), statistics) for name in source.tensors]
    record = recipe.model_dump(mode="json", exclude_none=True)
    what = f"{recipe.asked} by {recipe.method}" if recipe.kind == "sparsity" else f"low rank by {recipe.method}"
    files: dict[str, Any] = {name: path for name, path in source.files.items() if name != "README.md"}
    files["README.md"] = model_card(record, source, what).encode()
    if source.config:
        files["config.json"] = json_bytes(_config(recipe, source, layers, left))
    plan = Plan(
        sources=(source,) if statistics is None else (source, statistics.matrices),
        steps=tuple(steps),
        files=files,
        recipe={"prune": record, **({"found": dict(found.about)} if found.about else {})},
        problems=_problems(layers),
        warnings=[
            *_warnings(recipe, source, layers),
            *(statistics.otherwise(recipe.lifts) if statistics is not None and recipe.by_inputs else []),
        ],
        about={"left": left, "summary": _summary(source, steps, layers)},
        work=_work(recipe, source, steps),
        max_shard_bytes=max_shard_bytes,
    )
    return PrunePlan(plan, layers, left)


def _step(
    recipe: PruneRecipe, source: Checkpoint, name: str, layer: Layer | None, statistics: Statistics | None
) -> Step:
    if layer is None:
        return Step(((0, name),), {name: source.tensors[name]}, torch.Tensor.contiguous)
    assert recipe.method is not None
    if METHODS[recipe.method].gathers == "nothing":
        return Step(((0, name),), layer.outputs, partial(_alone, recipe=recipe, layer=layer))
    if statistics is None:
        return Step(((0, name),), layer.outputs, None)
    met = statistics.inputs.get(name)
    if met is None:
        return Step(((0, name),), layer.outputs, partial(_alone, recipe=recipe, layer=layer))
    function = partial(_from_statistics, recipe=recipe, layer=layer, met=met)
    return Step(((0, name), (1, met.linears[0])), layer.outputs, function)


def _alone(stored: Tensor, *, recipe: PruneRecipe, layer: Layer) -> Told:
    return _told(stored, Fed(), recipe, layer)


def _from_statistics(stored: Tensor, gram: Tensor, *, recipe: PruneRecipe, layer: Layer, met: Input) -> Told:
    return _told(stored, of_gram(gram, met.tokens, met.dropped), recipe, layer)


def _told(stored: Tensor, inputs: Fed, recipe: PruneRecipe, layer: Layer) -> Told:
    refuse_nonfinite(stored, f"tensor '{layer.linear.tensor}'")
    weight = stored.T if layer.linear.transposed else stored
    pruned = prune(weight, inputs, layer, recipe)
    tensors = layer.encode(pruned)
    return Told(tuple(tensors.values()), {layer.linear.module: explain(weight, pruned, inputs)})


def _config(
    recipe: PruneRecipe, source: Checkpoint, layers: Mapping[str, Layer], left: Mapping[str, str]
) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key != "_name_or_path"}
    if any(layer.form == "bitmask" for layer in layers.values()):
        weights = sum(layer.stored[0] * layer.stored[1] for layer in layers.values())
        share = 1 - sum(layer.kept for layer in layers.values()) / weights
        config["quantization_config"] = bitmask.settings(round(share, 6), recipe.asked.pattern)
    schemes = {layer.linear.module: layer.scheme for layer in layers.values() if layer.scheme is not None}
    if schemes:
        config["quantization_config"] = CODES.settings(schemes, plain_modules(source, left))
    ranks = {layer.linear.module: layer.rank for layer in layers.values() if layer.form == "factors"}
    return config | ({low_rank.KEY: ranks} if ranks else {})


def _problems(layers: Mapping[str, Layer]) -> list[str]:
    """What cannot be stored."""
    coded = {name: layer for name, layer in layers.items() if layer.scheme is not None}
    found = ((name, CODES.unfit(layer.linear.shape, layer.scheme)) for name, layer in coded.items() if layer.scheme)
    return [f"'{name}': {reason}" for name, reason in found if reason]


def _warnings(recipe: PruneRecipe, source: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
    warnings = unfitting(recipe.ignore, (name.removesuffix(".weight") for name in source.tensors))
    if source.quantization:
        warnings.append(f"{source.label} is quantized ({source.quantization}); the result is not")
    tails = Counter(
        tail for each in layers.values() if each.asked and (tail := dense_tail(each.linear.shape[1], each.asked))
    )
    if tails:
        warnings.append(f"{sum(tails.values())} layers have columns that do not fill a pattern; these stay dense")
    if any(layer.form == "bitmask" for layer in layers.values()):
        warnings.append("packed weights take less disk and are unpacked by wtool alone: transformers and vLLM cannot")
    if any(layer.form == "factors" for layer in layers.values()):
        warnings.append("factors are multiplied by wtool alone: transformers and vLLM cannot load them (--multiply)")
    return warnings


def _work(recipe: PruneRecipe, source: Checkpoint, steps: Sequence[Step]) -> dict[str, Any]:
    """What the walk takes, where there is one."""
    if recipe.method is None or all(step.function for step in steps):
        return {}
    asked, forwards = recipe.calibration, 1 if recipe.way == "sequential" else 2
    fits = METHODS[recipe.method].gathers == "gram"
    return walk_work(source, asked.samples, asked.seqlen, forwards=forwards, fits=fits)


def _summary(source: Checkpoint, steps: Sequence[Step], layers: Mapping[str, Layer]) -> dict[str, Any]:
    weights = sum(layer.stored[0] * layer.stored[1] for layer in layers.values())
    told: dict[str, Any] = {
        "bytes_before": source.nbytes,
        "bytes_after": sum(info.nbytes for step in steps for info in step.outputs.values()),
        "layers": len(layers),
        "weights": weights,
    }
    if any(layer.asked for layer in layers.values()):
        dropped = weights - sum(layer.kept for layer in layers.values())
        return told | {"dropped": dropped, "sparsity": round(dropped / weights, 6)}
    held = sum(_held(layer) for layer in layers.values())
    return told | {"held": held, "ratio": round(held / weights, 6)}


def _held(layer: Layer) -> int:
    """How many numbers a thin matrix is made of."""
    rows, columns = layer.stored
    return rows * columns if layer.rank is None else layer.rank * (rows + columns)
