"""From sizes to keep to a plan: which layers, heads, channels and experts stay, and what is fitted to that.

Sizes are known from the recipe and the headers, so a plan can be shown before anything is read; which of them stay is
found on calibration text.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.checkpoint import Checkpoint
from wtool.executors.local import Outcome, run
from wtool.layer_rules import depth_key, text_config
from wtool.layer_stack import keep_layers
from wtool.linear_names import linear_layers
from wtool.plan import DEFAULT_SHARD_BYTES, Plan, Step
from wtool.shards import json_bytes
from wtool.work import walk_work
from wtool.writer import Writer

from .candidate import Candidate
from .card import model_card
from .choice import WIDTHS, Start, by_importance, first, searched
from .cut import cut
from .families import FAMILIES, family_of
from .latency import weights_of_a_token
from .recipe import PruneRecipe
from .rotate import principal_directions
from .rotated import Rotated
from .structure import Kept, axes_of, place_of, shape_of, slices

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows

    from .compensate import Fitted
    from .importance import Importance


def plan_sizes(recipe: PruneRecipe, source: Checkpoint, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """The plan of a dry run: the first of everything stays.

    raises: UsageError, Mismatch
    """
    seen = Rotated(source, None) if recipe.rotate else source
    return _plan(recipe, seen, first(recipe, source), {}, max_shard_bytes)


def run_sizes(
    recipe: PruneRecipe,
    source: Checkpoint,
    out: Path,
    windows: "Windows | None",
    where: "Where",
    start: Start,
    *,
    force: bool = False,
    shard: int = DEFAULT_SHARD_BYTES,
) -> tuple[Plan, Outcome]:
    """Find out what stays, and cut.

    raises: WtoolError; what was written is kept and continued by the same call
    """
    plan_sizes(recipe, source).check()
    if windows is None:
        plan = _plan(recipe, source, by_importance(recipe, source, None, None, where, start), {}, shard)
        return plan, run(plan, out, force=force, progress=start("cutting", plan.about["summary"]["bytes_after"]))
    asked, found = recipe, _importance(recipe, source, windows, where, start)
    seen = source
    if recipe.rotate:
        assert found is not None
        seen, found = _rotated(recipe, source, found, windows, where, start)
    if recipe.searches:
        assert found is not None
        recipe = searched(recipe, seen, found, windows, where, start)
    kept = by_importance(recipe, source, found, windows, where, start)  # which a rotation would only make slower
    scale = _norm_factors(recipe, seen, found, kept)
    plan = _plan(asked, seen, kept, scale, shard)
    plan = replace(plan, recipe={**plan.recipe, "calibration": windows.record})
    fitted = _fitted(recipe, seen, kept) if recipe.compensate else {}
    if not fitted:
        whole = sum(info.nbytes for info in plan.outputs.values())
        return plan, run(plan, out, force=force, progress=start("cutting", whole))
    outputs = {each.output for each in fitted.values()}
    steps = tuple(
        Step(step.reads, step.outputs, None) if step.outputs.keys() <= outputs else step for step in plan.steps
    )
    plan = replace(plan, steps=steps)

    def walk(writer: Writer) -> None:
        _compensate(seen, kept, fitted, windows, writer, where, start)

    return plan, run(plan, out, force=force, walk=walk)


def _plan(
    recipe: PruneRecipe, source: Checkpoint, kept: Kept, scale: Mapping[str, float], max_shard_bytes: int
) -> Plan:
    steps, config = cut(source, kept, scale=scale)
    lighter: dict[str, Any] = _token_weights(source, kept)
    told: dict[str, Any] = {"kept": _told(kept), **({"norms": dict(scale)} if scale else {})}
    warnings: list[str] = []
    if isinstance(source, Rotated):
        steps, told["rotation"], warnings = source.steps(steps), source.digest, source.warnings(steps)
        source = source.source
    record = recipe.model_dump(mode="json", exclude_none=True)
    files: dict[str, Any] = {name: path for name, path in source.files.items() if name != "README.md"}
    summary = _summary(source, steps, config) | lighter
    what = ", ".join(f"{name} {before} to {after}" for name, (before, after) in summary["sizes"].items())
    files["README.md"] = model_card(record, source, what).encode()
    files["config.json"] = json_bytes({key: value for key, value in config.items() if key != "_name_or_path"})
    return Plan(
        sources=(source,),
        steps=tuple(steps),
        files=files,
        recipe={"prune": record, **told},
        warnings=warnings,
        about={"summary": summary},
        work=_work(recipe, source),
        max_shard_bytes=max_shard_bytes,
    )


def _work(recipe: PruneRecipe, source: Checkpoint) -> dict[str, Any]:
    """What looking at the model takes, and fitting what reads the cut channels."""
    if not recipe.by_text:
        return {}
    asked, forwards = recipe.calibration, 2 if recipe.compensate else 1
    return walk_work(source, asked.samples, asked.seqlen, forwards=forwards, fits=recipe.compensate)


def _summary(source: Checkpoint, steps: list[Step], config: Mapping[str, Any]) -> dict[str, Any]:
    outputs = [info for step in steps for info in step.outputs.values()]
    before, after = _sizes(source.config), _sizes(config)
    return {
        "bytes_before": source.nbytes,
        "bytes_after": sum(info.nbytes for info in outputs),
        "params_before": sum(info.elements for info in source.tensors.values()),
        "params_after": sum(info.elements for info in outputs),
        "sizes": {name: [size, after[name]] for name, size in before.items() if after[name] != size},
    }


def _token_weights(source: Checkpoint, kept: Kept) -> dict[str, Any]:
    """The work of a token before and after; nothing for a family that is not in the table."""
    if source.config.get("model_type") not in FAMILIES:
        return {}
    before, after = weights_of_a_token(source), weights_of_a_token(Candidate(source, kept))
    return {"token_weights_before": before, "token_weights_after": after}


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes a configuration tells; of a family that is not in the table the depth alone."""
    if config.get("model_type") not in FAMILIES:
        text = text_config(config)
        return {"layers": text[depth_key(text)]}
    shape = shape_of(config)
    return {name: size for name in ("layers", *WIDTHS) if (size := getattr(shape, name)) is not None}


def _told(kept: Kept) -> dict[str, Any]:
    """What stays, for the manifest."""
    told: dict[str, Any] = {"layers": list(kept.layers)}
    if kept.hidden is not None:
        told["hidden"] = list(kept.hidden)
    for name in ("ffn", "heads", "kv_heads", "experts"):
        if found := getattr(kept, name):
            told[name] = {str(layer): list(numbers) for layer, numbers in found.items()}
    if kept.expert_ffn:
        told["expert_ffn"] = {f"{layer}.{expert}": list(stay) for (layer, expert), stay in kept.expert_ffn.items()}
    return told


def _importance(
    recipe: PruneRecipe, source: Checkpoint, windows: "Windows", where: "Where", start: Start
) -> "Importance | None":
    """What the parts of the model do for it, where that is asked."""
    from .importance import observe

    by_state = isinstance(recipe.layers, int) and recipe.depth_score in ("block-influence", "angular")
    if not recipe.searches and not by_state and not any(getattr(recipe, name) is not None for name in WIDTHS):
        return None
    return observe(
        source, windows, where, lambda steps: start("looking at the model", steps), second_moment=recipe.rotate
    )


def _rotated(
    recipe: PruneRecipe, source: Checkpoint, found: "Importance", windows: "Windows", where: "Where", start: Start
) -> "tuple[Rotated, Importance]":
    """The model in its principal directions, and what was found, with what its norms see there."""
    from .importance import observe

    assert found.second_moment is not None
    directions = principal_directions(found.second_moment)
    turned = Rotated(source, directions)
    if not recipe.rescale_norms:
        return turned, found
    again = observe(source, windows, where, lambda steps: start("looking again", steps), directions=directions)
    return turned, replace(found, spread=again.spread)


def _norm_factors(recipe: PruneRecipe, source: Checkpoint, found: "Importance | None", kept: Kept) -> dict[str, float]:
    """What norms are multiplied by where they see fewer channels."""
    if found is None or kept.hidden is None or not recipe.rescale_norms:
        return {}
    from .width import norm_factor

    factors: dict[str, float] = {}
    for name, spread in found.spread.items():
        layer, _ = place_of(name)
        seen = name in source.tensors and len(spread) == source.tensors[name].elements
        if seen and (layer < 0 or layer in kept.layers) and axes_of(family_of(source.config), name) == ("hidden",):
            factors[name] = norm_factor(spread, kept.hidden)
    return factors


def _fitted(recipe: PruneRecipe, source: Checkpoint, kept: Kept) -> "dict[str, Fitted]":
    """The matrices whose inputs are cut and can be fitted, by their names among the layers that stay."""
    from .compensate import Fitted

    if not kept.widths:
        return {}
    family, shape = family_of(source.config), shape_of(source.config)
    view = keep_layers(source, kept.layers)
    linears, _ = linear_layers(view)
    steps, _ = cut(source, kept)
    stay = [name for name, origin in view.origins.items() if slices(family, origin, shape, kept) is not None]
    outputs = dict(zip(stay, (next(iter(step.outputs)) for step in steps), strict=True))
    found: dict[str, Fitted] = {}
    for name, linear in linears.items():
        origin = view.origins[name]
        axes = slices(family, origin, shape, kept)
        what = axes_of(family, origin)[0 if family.transposed else -1]
        if (
            axes is not None
            and what in ("ffn", "heads", "expert_ffn")
            and axes[0 if family.transposed else -1] is not None
        ):
            dtype = source.tensors[origin].dtype
            found[name] = Fitted(outputs[name], axes, dtype, linear.transposed)
    return found


def _compensate(
    source: Checkpoint,
    kept: Kept,
    fitted: "Mapping[str, Fitted]",
    windows: "Windows",
    writer: Writer,
    where: "Where",
    start: Start,
) -> None:
    from wtool import calibrate
    from wtool.rewrite import Rewriting

    from .compensate import Compensating

    view = keep_layers(source, kept.layers)
    network = calibrate.network(view, where)
    transposed = {name for name, each in fitted.items() if each.transposed}
    with Rewriting(Compensating(fitted, view.read), network, writer, transposed) as visitor:
        calibrate.walk(
            network,
            windows.unpadded(),
            visitor,
            way="one-pass",
            where=where,
            start=lambda steps: start("fitting", steps),
        )
        visitor.finish(fitted)
