"""Carrying out a plan: by streaming alone, or on a walk through the model."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wtool.executors import chosen
from wtool.executors.local import Outcome
from wtool.plan import DEFAULT_SHARD_BYTES, Plan
from wtool.ranks import current, one_process, own_device

from .fp8_planner import plan_fp8
from .planner import QuantPlan, plan_quantize
from .recipe import METHODS, QuantRecipe

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows
    from wtool.rewrite import Output


Progress = Callable[[int], None]


def calibration(recipe: QuantRecipe, plan: QuantPlan, *, trust_remote_code: bool = False) -> "Windows | None":
    """The windows a recipe asks for; None where it needs none.

    raises: InputError, RuntimeProblem
    """
    if recipe.statistics or not METHODS[recipe.method].calibrated:
        return None
    from wtool.calibration_data.for_model import windows_asked

    return windows_asked(plan.plan.sources[0], recipe.calibration, trust_remote_code=trust_remote_code)


def plan_asked(
    recipe: QuantRecipe,
    *,
    headers_only: bool = False,
    low_disk: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> QuantPlan:
    """The plan of a recipe of codes or of FP8; see `plan_quantize`."""
    make = plan_quantize if recipe.scheme is None else plan_fp8
    return make(recipe, headers_only=headers_only, low_disk=low_disk, max_shard_bytes=max_shard_bytes)


def run_quantization(
    recipe: QuantRecipe,
    plan: QuantPlan,
    out: Path,
    *,
    windows: "Windows | None",
    where: "Where",
    executor: str = "local",
    force: bool = False,
    start: Callable[[int], Progress],
) -> Outcome:
    """Carry out a plan, or go on with one that was stopped.

    windows: what `calibration` gave
    executor: where a plan without a walk is carried out
    start: is told how many steps there are and gives the function that is told of each

    raises: WtoolError; what was done is kept and continued by the same call
    """
    whole = sum(info.nbytes for info in plan.plan.outputs.values())
    if windows is None:
        one_process("a quantization without a walk")
        again = partial(_planned, recipe, plan.plan.max_shard_bytes)
        return chosen.run(executor, again, plan.plan, out, force=force, progress=start(whole))
    from wtool.executors import together

    if METHODS[recipe.method].scaled or METHODS[recipe.method].learned:
        one_process(f"a quantization by {recipe.method}")
    ranks, where = current(), replace(where, device=own_device(where.device))
    noted = {**plan.plan.recipe, "calibration": windows.record, "computed_in": _dtype(plan, where)}
    noted |= {"processes": ranks.size} if ranks.size > 1 else {}  # as sums in another order are other sums
    marked = replace(plan.plan, recipe=noted)

    def walk(output: "Output") -> None:
        _walk(recipe, plan, windows, output, where, start)

    return together.run(marked, out, force=force, walk=walk, ranks=ranks)


def _planned(recipe: QuantRecipe, max_shard_bytes: int) -> Plan:
    return plan_asked(recipe, max_shard_bytes=max_shard_bytes).plan


def _walk(
    recipe: QuantRecipe,
    plan: QuantPlan,
    windows: "Windows",
    output: "Output",
    where: "Where",
    start: Callable[[int], Progress],
) -> None:
    from wtool import block_fit, calibrate
    from wtool.rewrite import Rewriting

    from .calibrated import Quantizing
    from .learned import LearnedRewriting
    from .scaled import ScaledRewriting
    from .scaled_learned import ScaledLearnedRewriting

    network = calibrate.network(plan.plan.sources[0], where)
    transposed = {name for name, layer in plan.layers.items() if layer.linear.transposed}
    ranks, method, tokens = current(), METHODS[recipe.method], windows.unpadded()
    change = Quantizing(recipe, plan, ranks)
    if method.learned:
        learning = ScaledLearnedRewriting if method.scaled else LearnedRewriting
        with learning(change, network, output, transposed) as fitter:
            block_fit.walk(network, tokens, fitter, windows_together=recipe.batch, where=where, start=start)
            fitter.finish(plan.layers)
        return
    if method.scaled:
        rewriting = ScaledRewriting(change, network, output, transposed)
    else:
        rewriting = Rewriting(change, network, output, transposed, ranks)
    with rewriting as visitor:
        way = "asymmetric" if method.asymmetric else recipe.way
        calibrate.walk(network, tokens, visitor, way=way, where=where, ranks=ranks, start=start)
        visitor.finish(plan.layers)


def _dtype(plan: QuantPlan, where: "Where") -> str:
    from wtool.calibrate import working_dtype

    return where.dtype or working_dtype(plan.plan.sources[0], where.device)
