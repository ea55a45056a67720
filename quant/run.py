"""Carrying out a plan: by streaming alone, or on a walk through the model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wtool.executors.local import Outcome, run
from wtool.writer import Writer

from .planner import QuantPlan
from .recipe import METHODS, QuantRecipe

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows


Progress = Callable[[int], None]


def calibration(recipe: QuantRecipe, plan: QuantPlan, *, trust_remote_code: bool = False) -> "Windows | None":
    """The windows a recipe asks for; None where it needs none.

    raises: InputError, RuntimeProblem
    """
    if recipe.statistics or not METHODS[recipe.method].calibrated:
        return None
    from wtool.calibration_data.for_model import windows_asked

    return windows_asked(plan.plan.sources[0], recipe.calibration, trust_remote_code=trust_remote_code)


def run_quantization(
    recipe: QuantRecipe,
    plan: QuantPlan,
    out: Path,
    *,
    windows: "Windows | None",
    where: "Where",
    force: bool = False,
    start: Callable[[int], Progress],
) -> Outcome:
    """Carry out a plan, or go on with one that was stopped.

    windows: what `calibration` gave
    start: is told how many steps there are and gives the function that is told of each

    raises: WtoolError; what was done is kept and continued by the same call
    """
    whole = sum(info.nbytes for info in plan.plan.outputs.values())
    if windows is None:
        return run(plan.plan, out, force=force, progress=start(whole))
    noted = {**plan.plan.recipe, "calibration": windows.record, "computed_in": _dtype(plan, where)}
    marked = replace(plan.plan, recipe=noted)

    def walk(writer: Writer) -> None:
        _walk(recipe, plan, windows, writer, where, start)

    return run(marked, out, force=force, walk=walk)


def _walk(
    recipe: QuantRecipe,
    plan: QuantPlan,
    windows: "Windows",
    writer: Writer,
    where: "Where",
    start: Callable[[int], Progress],
) -> None:
    from wtool import calibrate
    from wtool.rewrite import Rewriting

    from .calibrated import Quantizing

    network = calibrate.network(plan.plan.sources[0], where)
    transposed = {name for name, layer in plan.layers.items() if layer.linear.transposed}
    with Rewriting(Quantizing(recipe, plan), network, writer, transposed) as visitor:
        calibrate.walk(network, windows.unpadded(), visitor, way=recipe.way, where=where, start=start)
        visitor.finish(plan.layers)


def _dtype(plan: QuantPlan, where: "Where") -> str:
    from wtool.calibrate import working_dtype

    return where.dtype or working_dtype(plan.plan.sources[0], where.device)
