"""A merge from its plan to what is told of it: shown, or carried out; the same for every kind of merge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wtool import options
from wtool.errors import UsageError
from wtool.memory import without_collection

if TYPE_CHECKING:
    from wtool.executors.local import Outcome
    from wtool.plan import Plan

    from .recipe import MergeRecipe

KEPT = 0.9  # share of a merge's change below which rounding is warned of


@dataclass(frozen=True)
class Job:
    """How a merge is run and told of, whatever is merged."""

    folder: Path | None  # to write; None where the plan is only shown
    dry_run: bool
    sketch: Path | None
    executor: str
    low_disk: bool
    settings: Mapping[str, Any]  # of the planner
    run: Mapping[str, Any]  # of the executor: workers, memory, force, allow_nonfinite
    as_json: bool
    quiet: bool

    @property
    def output(self) -> Path:
        """The folder, of what is not a dry run."""
        assert self.folder is not None
        return self.folder


def check_output(output: Path | None, dry_run: bool) -> None:
    """raises: UsageError where an output is wanted, and none is given"""
    if output is None and not dry_run:
        raise UsageError("where to? give the output folder with -o OUT (or --dry-run to see the plan)")


def merge_models(recipe: "MergeRecipe", job: Job) -> None:
    """Plan a merge, and show the plan or carry it out.

    raises: WtoolError; typer.Exit after a plan is shown
    """
    with without_collection():
        from .planner import plan_merge

    make = partial(plan_merge, recipe, **job.settings)
    plan = planned(make, job)
    if job.dry_run:
        raise typer.Exit(show(plan, job))
    check(plan, job)
    run(make, plan, job)


def planned(make: "Callable[..., Plan]", job: Job) -> "Plan":
    """The plan, by headers alone where it is only shown; make: of (headers_only=, low_disk=)."""
    return make(headers_only=job.dry_run, low_disk=options.downloads(job.low_disk, job.folder))


def show(plan: "Plan", job: Job) -> int:
    """Print a plan; the exit code tells whether it can be carried out."""
    from wtool.console import emit, emit_json

    options.draw(plan, job.sketch)
    if job.as_json:
        emit_json(summary(plan, job))
    else:
        emit(described(plan, job))
    return 3 if plan.problems else 0


def summary(plan: "Plan", job: Job) -> dict[str, Any]:
    """A plan in figures; raises UsageError where its results do not fit into --memory."""
    return plan.summary(*_means(plan, job))


def described(plan: "Plan", job: Job) -> str:
    """A plan in words; raises UsageError where its results do not fit into --memory."""
    return plan.describe(*_means(plan, job))


def _means(plan: "Plan", job: Job) -> tuple[int, int | None]:
    """The threads and the bytes of memory that a plan is carried out with."""
    from wtool.executors.budget import Budget
    from wtool.executors.local import default_workers

    Budget(job.run["memory"]).check(plan.steps)
    return job.run["workers"] or default_workers(), job.run["memory"]


def check(plan: "Plan", job: Job) -> None:
    """Refuse what the executor cannot do, and --low-disk where it does not help.

    raises: UsageError
    """
    from wtool.executors import chosen

    chosen.check(job.executor, plan)
    options.check_low_disk(job.low_disk, plan, job.executor)


def carry_out(job: Job) -> "Callable[..., Outcome]":
    """What carries out a plan: of (what makes it, the plan, the folder, progress=)."""
    from wtool.executors import chosen

    return partial(chosen.run, job.executor, **job.run)


def run(make: "Callable[..., Plan]", plan: "Plan", job: Job) -> None:
    """Carry out a plan and tell what was done."""
    import time

    from wtool import console

    plan.check()
    for warning in plan.warnings:
        console.warn(warning)
    start = time.perf_counter()
    total = sum(info.nbytes for info in plan.outputs.values())
    with console.progress("merging", total, quiet=job.quiet) as advance:
        outcome = carry_out(job)(make, plan, job.output, progress=advance)
    if (lost := _lost_to_rounding(job.output)) is not None:
        console.warn(lost)
        plan = replace(plan, warnings=[*plan.warnings, lost])
    tell(plan, outcome, job, time.perf_counter() - start, plan.about)


def _lost_to_rounding(output: Path) -> str | None:
    """A warning where rounding to the nearest took much of what a merge changed."""
    import json
    from statistics import median

    from wtool.writer import MANIFEST

    report = json.loads((output / MANIFEST).read_bytes()).get("report", {})
    shares = [entry["kept"] for entry in report.values() if "kept" in entry]
    if not shares or median(shares) >= KEPT:
        return None
    return (
        f"rounding to 16 bits left {median(shares):.0%} of what the merge changes (the median of {len(shares)} "
        "matrices): most changes are smaller than a step; --rounding stochastic keeps all of it, in the mean"
    )


def tell(plan: "Plan", outcome: "Outcome", job: Job, seconds: float, about: Mapping[str, Any]) -> None:
    """Print what was done.

    about: what else --json tells
    """
    from wtool.console import emit, emit_json, human_bytes
    from wtool.outcome import outcome_record, resumed, there_already

    count, size = len(plan.outputs), plan.bytes_to_write
    if job.as_json:
        record = outcome_record(job.output, outcome, seconds, plan.warnings, tensors=count, bytes=size)
        emit_json({**record, **about})
    elif outcome.already_there:
        emit(there_already(job.output))
    else:
        emit(f"{job.output}: {count} tensors, {human_bytes(size)} in {seconds:.1f} s{resumed(outcome)}")
