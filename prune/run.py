"""Carrying out the plan of a pruning by a method: by streaming alone, or on a walk through the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wtool.checkpoint import Checkpoint
from wtool.executors.local import Outcome, run
from wtool.statistics_folder import Statistics
from wtool.writer import Writer

from .planner import Found, PrunePlan
from .recipe import PruneRecipe

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows

Progress = Callable[[int], None]
Start = Callable[[str, int], Progress]  # what is done, in how many steps


def needs_text(recipe: PruneRecipe) -> bool:
    """Whether calibration text is needed."""
    if recipe.method is None:
        return recipe.by_text
    if recipe.statistics is not None:
        return False
    return recipe.by_inputs


def found_out(
    recipe: PruneRecipe,
    source: Checkpoint,
    statistics: Statistics | None,
    windows: "Windows | None",
    where: "Where",
    start: Start,
) -> Found:
    """What the dense model tells of how much each matrix can lose, where the recipe asks for it.

    raises: InputError
    """
    from . import amounts

    if recipe.kind == "sparsity" and recipe.layer_ratios == "owl":
        return amounts.by_outliers(recipe, source, statistics, windows, where, start)
    if recipe.kind == "rank" and recipe.ranks == "energy":
        return amounts.by_energy(recipe, source, statistics, windows, where, start)
    return Found()


def run_matrices(
    recipe: PruneRecipe,
    plan: PrunePlan,
    out: Path,
    *,
    windows: "Windows | None",
    where: "Where",
    force: bool = False,
    start: Start,
) -> Outcome:
    """Carry out a plan, or go on with one that was stopped.

    windows: of calibration text, where the method needs it and no statistics are given

    raises: WtoolError; what was done is kept and continued by the same call
    """
    if windows is None or all(step.function for step in plan.plan.steps):
        whole = sum(info.nbytes for info in plan.plan.outputs.values())
        return run(plan.plan, out, force=force, progress=start("pruning", whole))
    from wtool.calibrate import working_dtype

    dtype = where.dtype or working_dtype(plan.plan.sources[0], where.device)
    noted = {**plan.plan.recipe, "calibration": windows.record, "computed_in": dtype}

    def walk(writer: Writer) -> None:
        _walk(recipe, plan, windows, writer, where, start)

    return run(replace(plan.plan, recipe=noted), out, force=force, walk=walk)


def _walk(
    recipe: PruneRecipe, plan: PrunePlan, windows: "Windows", writer: Writer, where: "Where", start: Start
) -> None:
    from wtool import calibrate
    from wtool.rewrite import Rewriting

    from .sparsifying import Sparsifying

    network = calibrate.network(plan.plan.sources[0], where)
    transposed = {name for name, layer in plan.layers.items() if layer.linear.transposed}
    with Rewriting(Sparsifying(recipe, plan.layers), network, writer, transposed) as visitor:
        calibrate.walk(
            network,
            windows.unpadded(),
            visitor,
            way=recipe.way,
            where=where,
            start=lambda steps: start("pruning", steps),
        )
        visitor.finish(plan.layers)
