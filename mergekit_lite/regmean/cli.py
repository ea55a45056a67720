"""`wtool merge --method regmean` and `regmean++`: their options, how they are run, and what is printed."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool.errors import UsageError

from ..flags import beside_file, is_file
from ..job import Job, tell

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows
    from wtool.executors.local import Outcome
    from wtool.plan import Plan

    from .planner import RegMeanPlan
    from .recipe import RegMeanRecipe

Progress = Callable[[int], None]
Calib = Annotated[list[str] | None, typer.Option(help="regmean: calibration text, once for all models or once a model")]
Samples = Annotated[int | None, typer.Option(min=1, help="regmean: calibration windows of a model [default: 128]")]
Seqlen = Annotated[int | None, typer.Option(min=2, help="regmean: tokens of a window [default: 2048]")]
TextColumn = Annotated[str | None, typer.Option(help="regmean: key or column of the text, where it is none usual")]
Split = Annotated[str | None, typer.Option(help="regmean: of a dataset [default: train]")]
Stats = Annotated[
    list[str] | None,
    typer.Option(
        "--stats", "--statistics", metavar="FOLDER", help="regmean: folder of `wtool calibrate`, once a model"
    ),
]


def asked(
    models: Sequence[str],
    calibration: Mapping[str, Any],
    statistics: Sequence[str] | None,
    flags: Mapping[str, Any],
) -> "RegMeanRecipe | None":
    """The recipe that a command line asks for; None where it is one of another method.

    calibration: data, samples, seqlen, …; None where not given
    flags:       what is given to `wtool merge`, by the names that recipes have for it
    raises:      UsageError
    """
    if flags.get("merge_method") not in ("regmean", "regmean++") and not is_file(models):
        return _of_other_methods(calibration, statistics)
    from .recipe import of_file, of_flags

    text = {key: value for key, value in calibration.items() if value is not None}
    rest = dict(flags)
    if is_file(models):
        recipe = of_file(Path(models[0]))
        if extra := [*models[1:], *(f"--{key}" for key in (*rest, *text, *(["stats"] if statistics else [])))]:
            if recipe is not None:
                raise beside_file(models[0], extra[0])
        return recipe or _of_other_methods(calibration, statistics)
    method = rest.pop("merge_method")
    if "rounding" in rest:
        raise UsageError(f"--rounding is not for --method {method}, which rounds to the nearest")
    text |= {"seed": rest.pop("seed")} if "seed" in rest else {}
    return of_flags(
        method,
        models,
        weight=rest.pop("weight", ()),
        data=text.pop("data", ()),
        statistics=statistics or (),
        calibration=text,
        dtype=rest.pop("dtype", None),
        parameters=rest,
    )


def _of_other_methods(calibration: Mapping[str, Any], statistics: Sequence[str] | None) -> None:
    given = [key for key, value in calibration.items() if value is not None]
    if given or statistics:
        option = "stats" if statistics else "calib" if given[0] == "data" else given[0].replace("_", "-")
        raise UsageError(f"--{option} is for --method regmean and regmean++; the other methods take no text")


def merge(recipe: "RegMeanRecipe", job: Job, place: "Callable[[], Where]", *, greedy: object) -> None:
    """Carry out a merge and tell what it did, or show the plan.

    place:  where the walk goes
    greedy: what --greedy says, which does not go with it

    raises: WtoolError; typer.Exit after a plan is shown
    """
    _check(job, greedy)
    if job.dry_run:
        raise typer.Exit(_show(recipe, job))
    from wtool import console

    from .planner import plan_regmean

    begin = time.perf_counter()
    planned = plan_regmean(recipe, **job.settings)
    planned.plan.check()
    for warning in planned.plan.warnings:
        console.warn(warning)
    with ExitStack() as stack:

        def start(steps: int, unit: str) -> Progress:
            return stack.enter_context(console.progress("merging", steps, quiet=job.quiet, unit=unit))

        outcome = _run(recipe, planned, job, place, start)
    _tell(planned.plan, outcome, job, time.perf_counter() - begin)


def _check(job: Job, greedy: object) -> None:
    """Refuse what does not go with it; raises UsageError."""
    from wtool import options

    options.refuse_low_disk(job.low_disk, "regmean")
    if job.executor != "local":
        raise UsageError(f"--executor {job.executor}: regmean runs in this process; leave it out")
    if greedy:
        raise UsageError("--greedy searches means of models (--method linear); regmean takes all that are given")


def _show(recipe: "RegMeanRecipe", job: Job) -> int:
    """Print a plan; the exit code tells whether it can be carried out."""
    from wtool import options
    from wtool.console import emit, emit_json
    from wtool.executors.local import default_workers

    from .planner import plan_regmean

    planned = plan_regmean(recipe, headers_only=True, **job.settings)
    plan, workers, memory = planned.plan, job.run["workers"] or default_workers(), job.run["memory"]
    options.draw(plan, job.sketch)
    if job.as_json:
        emit_json(plan.summary(workers, memory))
    else:
        emit(f"{len(planned.layers)} linear layers by {recipe.merge_method}, all else averaged")
        emit(plan.describe(workers, memory))
    return 3 if plan.problems else 0


def _run(
    recipe: "RegMeanRecipe",
    planned: "RegMeanPlan",
    job: Job,
    place: "Callable[[], Where]",
    start: Callable[[int, str], Progress],
) -> "Outcome":
    from wtool.executors.local import run
    from wtool.writer import Writer

    if not recipe.takes_text or not planned.layers:
        size = sum(info.nbytes for info in planned.plan.outputs.values())
        return run(planned.plan, job.output, progress=start(size, "bytes"), **job.run)
    from wtool.calibrate import working_dtype

    from .walk import walk_models

    where = place()
    windows = _windows(recipe, planned, where, job.quiet)
    dtype = where.dtype or working_dtype(planned.plan.sources[0], where.device)
    records = [each.record for each in windows]
    noted = {**planned.plan.recipe, "calibration": records, "computed_in": dtype}

    def walk(writer: Writer) -> None:
        walk_models(recipe, planned, windows, writer, where, lambda steps: start(steps, "batches"))

    return run(replace(planned.plan, recipe=noted), job.output, walk=walk, **job.run)


def _windows(recipe: "RegMeanRecipe", planned: "RegMeanPlan", where: "Where", quiet: bool) -> "list[Windows]":
    """Each model's text, cut by its own tokenizer."""
    from wtool import options
    from wtool.calibration_data.for_model import windows_asked

    found: list[Windows] = []
    for number, (source, _) in enumerate(next(iter(planned.reads.values()))):
        checkpoint = planned.plan.sources[source]
        text = recipe.text_of(number)
        found.append(windows_asked(checkpoint, text, trust_remote_code=where.trust_remote_code))
        options.tell(found[-1], quiet)
    return found


def _tell(plan: "Plan", outcome: "Outcome", job: Job, seconds: float) -> None:
    from wtool.console import emit
    from wtool.writer import MANIFEST

    report = json.loads((job.output / MANIFEST).read_bytes()).get("report", {})
    ratios = [entry["objective"] for entry in report.values() if "objective" in entry]
    fallbacks = {name: entry["fallback"] for name, entry in report.items() if "fallback" in entry}
    objective = median(ratios) if ratios else None
    tell(plan, outcome, job, seconds, {"objective": objective, "fallbacks": fallbacks, "report": report})
    if job.as_json or outcome.already_there:
        return
    if ratios:
        emit(
            f"the outputs of {len(ratios)} linear layers are off by {median(ratios):.0%} of what the mean's are, in "
            f"squares (median; the worst {max(ratios):.0%})"
        )
    for name, why in fallbacks.items():
        emit(f"averaged: {name}: {why}")
