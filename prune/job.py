"""A pruning as the command line runs it: shown, carried out, and what it did told."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wtool import console, options
from wtool.checkpoint import Checkpoint
from wtool.console import emit, emit_json, human_bytes
from wtool.executors.local import Outcome
from wtool.plan import Plan
from wtool.statistics_folder import Statistics
from wtool.writer import MANIFEST

from .planner import open_source, plan_matrices
from .recipe import PruneRecipe

if TYPE_CHECKING:
    from wtool.calibrate import Where


@dataclass(frozen=True)
class Job:
    """How prunings are run and told of."""

    shard: int  # bytes of the largest output file
    where: "Where"
    force: bool
    as_json: bool
    quiet: bool
    low_disk: bool = False

    def run(self, recipe: PruneRecipe, output: Path) -> None:
        """Carry out a pruning and tell what it did."""
        plan, outcome, seconds = self.carry_out(recipe, output)
        _tell(recipe, plan, outcome, output, seconds, self.as_json)

    def carry_out(self, recipe: PruneRecipe, output: Path) -> tuple[Plan, Outcome, float]:
        """Carry out a pruning.

        returns: the plan, how it ended, and seconds
        raises: WtoolError
        """
        from wtool.calibration_data.for_model import windows_asked

        from .run import found_out, needs_text, run_matrices

        begin = time.perf_counter()
        if needs_text(recipe) or recipe.kind != "sparsity":
            options.refuse_low_disk(self.low_disk, f"pruning by {recipe.method or 'structure'}")
        source, statistics = open_source(recipe, low_disk=options.downloads(self.low_disk, output))
        _planned(recipe, source, statistics, self.shard).check()  # before any text is read
        windows = None
        if needs_text(recipe):
            windows = windows_asked(source, recipe.calibration, trust_remote_code=self.where.trust_remote_code)
            options.tell(windows, self.quiet)
        with ExitStack() as stack:

            def start(what: str, steps: int) -> Callable[[int], None]:
                stack.close()
                unit = "bytes" if windows is None else "batches"
                return stack.enter_context(console.progress(what, steps, quiet=self.quiet, unit=unit))

            if recipe.kind == "structure":
                from .structural import run_sizes

                plan, outcome = run_sizes(
                    recipe, source, output, windows, self.where, start, force=self.force, shard=self.shard
                )
            else:
                found = found_out(recipe, source, statistics, windows, self.where, start)
                made = plan_matrices(recipe, source, statistics, found, max_shard_bytes=self.shard)
                outcome = run_matrices(
                    recipe, made, output, windows=windows, where=self.where, force=self.force, start=start
                )
                plan = made.plan
        for warning in () if self.quiet else plan.warnings:
            console.warn(warning)
        return plan, outcome, time.perf_counter() - begin


def _planned(recipe: PruneRecipe, source: Checkpoint, statistics: Statistics | None, shard: int) -> Plan:
    """The plan as far as headers tell it.

    raises: WtoolError
    """
    if recipe.kind == "structure":
        from .structural import plan_sizes

        return plan_sizes(recipe, source, max_shard_bytes=shard)
    return plan_matrices(recipe, source, statistics, max_shard_bytes=shard).plan


def show(recipe: PruneRecipe, shard: int, sketch: Path | None, as_json: bool) -> int:
    """Print a plan; the exit code tells whether it can be carried out."""
    plan = _planned(recipe, *open_source(recipe, headers_only=True), shard)
    options.draw(plan, sketch)
    if as_json:
        emit_json({**plan.summary(1), **plan.about["summary"]})
        return 3 if plan.problems else 0
    emit(f"{recipe.model}: {in_words(recipe, plan)}")
    for warning in plan.warnings:
        emit(f"warning: {warning}")
    for problem in plan.problems:
        emit(f"problem: {problem}")
    emit("this plan cannot be carried out" if plan.problems else "no problem found")
    return 3 if plan.problems else 0


def in_words(recipe: PruneRecipe, plan: Plan) -> str:
    told = plan.about["summary"]
    sizes = f"{human_bytes(told['bytes_before'])} become {human_bytes(told['bytes_after'])}"
    if recipe.kind == "structure":
        changes = ", ".join(f"{name} {before} to {after}" for name, (before, after) in told["sizes"].items())
        params = f"{told['params_before']:,} parameters become {told['params_after']:,}"
        work = ""
        if "token_weights_after" in told:
            work = f"; a token has {told['token_weights_after'] / told['token_weights_before']:.1%} of the work it had"
        return f"{changes or 'no size changes'}; {params}, {sizes}{work}"
    if recipe.kind == "rank":
        return f"{told['layers']} layers by {recipe.method} hold {told['ratio']:.1%} of their numbers; {sizes}"
    same = (
        ""
        if recipe.pack or recipe.bits
        else ": zeros take as much room and time as other numbers (--pack makes the files smaller)"
    )
    return (
        f"{told['dropped']:,} of {told['weights']:,} weights of {told['layers']} layers ({told['sparsity']:.2%}) "
        f"dropped by {recipe.method}, {recipe.asked}; {sizes}{same}"
    )


def _tell(recipe: PruneRecipe, plan: Plan, outcome: Outcome, output: Path, seconds: float, as_json: bool) -> None:
    report = json.loads((output / MANIFEST).read_bytes()).get("report", {})
    fallbacks = {name: entry["fallback"] for name, entry in report.items() if "fallback" in entry}
    if as_json:
        emit_json(
            {
                "output": str(output),
                "already_there": outcome.already_there,
                "resumed_bytes": outcome.resumed_bytes,
                **plan.about["summary"],
                "fallbacks": fallbacks,
                "report": report,
                "seconds": round(seconds, 3),
                "warnings": list(plan.warnings),
            }
        )
        return
    if outcome.already_there:
        emit(f"{output}: there already, made by this recipe from these inputs; nothing to do (--force makes it anew)")
        return
    resumed = f", {human_bytes(outcome.resumed_bytes)} of it from the run before" if outcome.resumed_bytes else ""
    emit(f"{output}: {in_words(recipe, plan)}; {seconds:.1f} s{resumed}")
    for name, reason in fallbacks.items():
        emit(f"not {f'by {recipe.method}' if recipe.method else 'fitted'}: {name}: {reason}")
