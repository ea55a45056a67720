"""The plan of a merge by RegMean: that of the mean, with other steps for the linear layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from wtool.checkpoint import Checkpoint
from wtool.dtypes import torch_dtype
from wtool.errors import Mismatch
from wtool.linear_names import LinearLayer, linear_layers
from wtool.plan import DEFAULT_SHARD_BYTES, Plan, Step, Told
from wtool.statistics_folder import Statistics, check_model, open_statistics
from wtool.work import walk_work

from ..card import model_card
from ..methods.regmean import ROWS, Merged, regmean_shared
from ..planner import plan_merge
from .recipe import RegMeanRecipe

FLOAT = 4  # bytes of what is computed in


@dataclass(frozen=True)
class RegMeanPlan:
    """What will happen."""

    plan: Plan
    layers: Mapping[str, LinearLayer]  # what is merged by RegMean, by the tensors' names
    reads: Mapping[str, tuple[tuple[int, str], ...]]  # (source, tensor) of each model, by the same names


def plan_regmean(
    recipe: RegMeanRecipe,
    *,
    headers_only: bool = False,
    low_disk: Path | None = None,
    ignore_tokenizers: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> RegMeanPlan:
    """Make the plan of a merge; arguments and errors as of `plan_merge`.

    raises: Mismatch too, where statistics are of another model
    """
    plan = plan_merge(
        recipe.as_means(),
        headers_only=headers_only,
        low_disk=low_disk,
        ignore_tokenizers=ignore_tokenizers,
        max_shard_bytes=max_shard_bytes,
    )
    steps = {name: step for step in plan.steps for name in step.outputs}
    layers = {name: layer for name, layer in linear_layers(plan.sources[0])[0].items() if name in steps}
    reads = {name: steps[name].reads for name in layers}
    record = recipe.model_dump(mode="json", exclude_none=True)
    plan = replace(
        plan,
        recipe={"merge": record},
        files={**plan.files, "README.md": model_card(record, plan.sources).encode()},
        warnings=[*plan.warnings, *_remarks(recipe, plan, layers)],
    )
    if recipe.takes_text:
        plan = replace(plan, steps=tuple(_walked(step, layers) for step in plan.steps), work=_work(recipe, plan))
    elif layers and not plan.problems:
        plan = _from_statistics(recipe, plan, layers, reads)
    return RegMeanPlan(plan, layers, reads)


def groups(
    names: Iterable[str], inputs: Sequence[Mapping[str, str]], layers: Mapping[str, LinearLayer]
) -> dict[tuple[str | None, ...], list[str]]:
    """Linears that share their input in every model, by the names of its Gram matrices: one a model, None where none.

    inputs: linear -> the name of its input's Gram matrix, one mapping a model
    """
    found: dict[tuple[str | None, ...], list[str]] = {}
    for name in names:
        key = tuple(each.get(name) for each in inputs)
        key = key if any(key) else (*key, name)  # nothing is known: each alone
        found.setdefault(key, []).append(name)
    assert all(len({layers[name].shape[1] for name in alike}) == 1 for alike in found.values())
    return found


def merged_group(
    recipe: RegMeanRecipe,
    layers: Sequence[LinearLayer],
    stored: Sequence[Sequence[Tensor]],
    grams: Sequence[Tensor | None],
) -> tuple[list[Tensor], dict[str, Any]]:
    """Merge linears that share their input.

    stored:  [linear][model], as they lie in the checkpoints
    returns: the tensors as they will lie, and the report (JSON)
    """
    turned = [
        [tensor.T if layer.transposed else tensor for tensor in models]
        for layer, models in zip(layers, stored, strict=True)
    ]
    numbers = recipe.parameters
    dtype = torch_dtype(recipe.output_dtype) if recipe.output_dtype else None
    found = regmean_shared(
        turned, grams, weight=recipe.weights, alpha=numbers.alpha, damping=numbers.damping, dtype=dtype
    )
    tensors = [
        (each.weight.T if layer.transposed else each.weight).cpu().contiguous()
        for layer, each in zip(layers, found, strict=True)
    ]
    return tensors, {layer.module: told(each) for layer, each in zip(layers, found, strict=True)}


def told(merged: Merged) -> dict[str, Any]:
    """What the report tells of a matrix."""
    if merged.fallback:
        return {"fallback": merged.fallback}
    return {"objective": merged.objective, "damping": merged.damping}


def _walked(step: Step, layers: Mapping[str, LinearLayer]) -> Step:
    return replace(step, function=None) if any(name in layers for name in step.outputs) else step


def _from_statistics(
    recipe: RegMeanRecipe,
    plan: Plan,
    layers: Mapping[str, LinearLayer],
    reads: Mapping[str, tuple[tuple[int, str], ...]],
) -> Plan:
    """The plan with steps that read Gram matrices, at the places of the first of the linears that share an input."""
    found = [open_statistics(Path(entry.statistics or "")) for entry in recipe.models]
    _check_models(found, [plan.sources[source] for source, _ in next(iter(reads.values()))])
    inputs = [{name: met.linears[0] for name, met in each.inputs.items() if met.tokens} for each in found]
    steps: list[Step] = []
    by_first = {names[0]: (key, names) for key, names in groups(layers, inputs, layers).items()}
    infos = plan.outputs
    for step in plan.steps:
        name = next(iter(step.outputs))
        if name in by_first:
            key, names = by_first[name]
            outputs = {each: infos[each] for each in names}
            known = [(len(plan.sources) + i, gram) for i, gram in enumerate(key[: len(found)]) if gram is not None]
            function = partial(
                _merge_read,
                recipe=recipe,
                layers=[layers[each] for each in names],
                known=[gram is not None for gram in key[: len(found)]],
            )
            read = [pair for each in names for pair in reads[each]]
            steps.append(Step((*read, *known), outputs, function, _scratch([layers[each] for each in names])))
        elif name not in layers:
            steps.append(step)
    sources = (*plan.sources, *(each.matrices for each in found))
    return replace(plan, sources=sources, steps=tuple(steps), about={**plan.about, **_calibrated(found)})


def _check_models(found: Sequence[Statistics], models: Sequence[Checkpoint]) -> None:
    """Raise Mismatch where statistics are not of the model they stand for.

    Models tuned from one have headers alike, so the names tell which of them it is.
    """
    names = [_place(model.label) for model in models]
    for statistics, model, name in zip(found, models, names, strict=True):
        check_model(statistics, model)
        if statistics.lifted:
            raise Mismatch(
                f"{statistics.matrices.label}: these statistics are of lifted tokens and RegMean needs them as they "
                "are; gather them without --lift"
            )
        label = str(statistics.manifest.get("model"))
        if _place(label) != name and _place(label) in names:
            raise Mismatch(
                f"{statistics.matrices.label}: these statistics are of {label} and stand in the place of "
                f"{model.label}'s; give them in the order of the models"
            )


def _place(label: str) -> str:
    return str(Path(label).resolve()) if Path(label).exists() else label


def _merge_read(*tensors: Tensor, recipe: RegMeanRecipe, layers: Sequence[LinearLayer], known: Sequence[bool]) -> Told:
    """A step of a plan that starts from statistics: the linears' tensors of all models, then the Gram matrices."""
    count = len(known)
    stored = [tensors[i * count : (i + 1) * count] for i in range(len(layers))]
    rest = iter(tensors[len(layers) * count :])
    grams = [next(rest) if there else None for there in known]
    made, report = merged_group(recipe, layers, stored, grams)
    return Told(tuple(made), report)


def _scratch(layers: Sequence[LinearLayer]) -> int:
    columns = layers[0].shape[1]
    return FLOAT * (3 * columns**2 + 6 * min(ROWS, max(layer.shape[0] for layer in layers)) * columns)


def _calibrated(found: Sequence[Statistics]) -> dict[str, Any]:
    return {"calibration": [each.manifest.get("calibration") for each in found]}


def _remarks(recipe: RegMeanRecipe, plan: Plan, layers: Mapping[str, LinearLayer]) -> list[str]:
    """What the user should know of what becomes the mean."""
    others = linear_layers(plan.sources[0])[1]
    fused = [name for name, why in others.items() if why.startswith("experts fused")]
    remarks = [f"{len(fused)} tensors hold fused experts and are averaged: '{fused[0]}'"] if fused else []
    return remarks if layers else [*remarks, f"no linear layer is known by its name: {recipe.merge_method} is a mean"]


def _work(recipe: RegMeanRecipe, plan: Plan) -> dict[str, Any]:
    """What the walk takes: each model's text goes through the model, with regmean++ twice."""
    asked = recipe.calibration
    forwards = 2 if recipe.merge_method == "regmean++" else 1
    one = walk_work(plan.sources[0], asked.samples, asked.seqlen, forwards=forwards, fits=True)
    return {key: len(recipe.models) * value for key, value in one.items()}
