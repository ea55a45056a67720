"""From a recipe to the plan of a checkpoint in FP8: a step for each tensor, from headers alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from wtool.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from wtool.dtypes import torch_dtype
from wtool.errors import UsageError
from wtool.finite import refuse_nonfinite
from wtool.formats.fp8 import SCHEMES, Fp8, layout, relative_error, scale_dtype, settings, unfit
from wtool.linear_names import LinearLayer, linear_layers, plain_modules
from wtool.plan import DEFAULT_SHARD_BYTES, Plan, Step, Told
from wtool.recipe_parts import fits
from wtool.shards import json_bytes

from .card import model_card
from .fp8 import fp8
from .planner import QuantPlan, as_stored, output_config, source_warnings, stored_dtype
from .recipe import OF_FP8, QuantRecipe
from .targets import fp8_problems, unopened_fp8


def plan_fp8(
    recipe: QuantRecipe,
    *,
    headers_only: bool = False,
    low_disk: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> QuantPlan:
    """Make the plan, as `plan_quantize` does for codes.

    raises: UsageError, InputError where there is nothing to plan on; else `Plan.problems` tells
    """
    assert recipe.scheme is not None
    scheme = SCHEMES[recipe.scheme]
    source = open_checkpoint(recipe.model, headers_only=headers_only, low_disk=low_disk)
    found, left = linear_layers(source)
    ignored = {name for name, linear in found.items() if any(fits(entry, linear.module) for entry in recipe.ignore)}
    layers = {name: linear for name, linear in found.items() if name not in ignored}
    left = {**left, **dict.fromkeys(sorted(ignored), "ignored, as asked")}
    if not layers:
        raise UsageError(f"{source.label}: no linear layer is left to quantize ({len(left)} matrices are none)")
    steps = [_step(recipe, scheme, source, name, layers.get(name)) for name in source.tensors]
    unfitting = [(name, unfit(recipe.format, linear.shape, scheme.blocks)) for name, linear in layers.items()]
    problems = [f"'{name}': {why}" for name, why in unfitting if why]
    problems += fp8_problems(recipe, scheme, {linear.module: linear.shape for linear in layers.values()})
    odd = unopened_fp8(layers.values())
    problems += [f"transformers: {line}" for line in odd if recipe.target == "transformers"]
    record = recipe.model_dump(mode="json", exclude_none=True, include=OF_FP8)
    files: dict[str, Any] = {name: path for name, path in source.files.items() if name != "README.md"}
    files["README.md"] = model_card(record, source, [scheme]).encode()
    if source.config:
        told = settings(recipe.format, scheme, plain_modules(source, left))
        files["config.json"] = json_bytes(output_config(source, told, steps))
    plan = Plan(
        sources=(source,),
        steps=tuple(steps),
        files=files,
        recipe={"quantize": record},
        problems=problems,
        warnings=[*source_warnings(recipe, source), *odd, *_odd(scheme, layers)],
        about={"left": left, "summary": _summary(source, steps, scheme)},
        max_shard_bytes=max_shard_bytes,
    )
    return QuantPlan(plan, {}, left)


def _step(recipe: QuantRecipe, scheme: Fp8, source: Checkpoint, name: str, linear: LinearLayer | None) -> Step:
    info = source.tensors[name]
    dtype = stored_dtype(recipe, info)
    if linear is None:
        return Step(((0, name),), {name: TensorInfo(dtype, info.shape)}, partial(as_stored, dtype=torch_dtype(dtype)))
    infos = layout(recipe.format, linear.shape, scheme.blocks, scale_dtype(recipe.format, dtype))
    outputs = {f"{linear.module}.{suffix}": each for suffix, each in infos.items()}
    return Step(((0, name),), outputs, partial(_rounded, linear=linear, scheme=scheme, outputs=outputs))


def _rounded(weight: Tensor, *, linear: LinearLayer, scheme: Fp8, outputs: Mapping[str, TensorInfo]) -> Told:
    refuse_nonfinite(weight, f"tensor '{linear.tensor}'")
    weight = weight.T if linear.transposed else weight
    info = list(outputs.values())[1]  # of the scales
    codes, scales = fp8(weight, scheme.blocks, scale_dtype=torch_dtype(info.dtype))
    told = {
        "bits": 8,
        "scale": str(scheme.blocks),
        "weight_error": round(relative_error(weight, codes, scales, scheme.blocks), 6),
    }
    return Told((codes, scales.reshape(info.shape)), {linear.module: told})


def _odd(scheme: Fp8, layers: Mapping[str, LinearLayer]) -> list[str]:
    """A warning where runtimes cannot round what comes into a layer as the scheme says."""
    odd = [name for name, linear in layers.items() if scheme.activations == "group" and linear.shape[1] % 128]
    if not odd:
        return []
    return [
        f"groups of 128 do not divide the inputs of {len(odd)} layer(s), the first is '{odd[0]}': runtimes can decode "
        "them, and not compute with them in FP8; the scheme fp8-dynamic takes any"
    ]


def _summary(source: Checkpoint, steps: Sequence[Step], scheme: Fp8) -> dict[str, Any]:
    packed = [list(step.outputs.values()) for step in steps if len(step.outputs) > 1]
    weights = sum(codes.elements for codes, _ in packed)
    return {
        "bytes_before": source.nbytes,
        "bytes_after": sum(step.nbytes_written for step in steps),
        "layers": len(packed),
        "weights": weights,
        "bits_per_weight": round(sum(info.nbytes for infos in packed for info in infos) * 8 / max(1, weights), 4),
        "schemes": {str(scheme): len(packed)},
    }
