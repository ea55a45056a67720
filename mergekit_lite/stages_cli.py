"""`wtool merge` of a file with several documents: plans shown together, stages made one after the other."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool.errors import OutputExists, UsageError

from .flags import is_file
from .job import Job, carry_out, described, planned, run, summary
from .job import check as check_plan

if TYPE_CHECKING:
    from wtool.plan import Plan

    from .recipe import MergeRecipe
    from .stages import Stages

KeepStages = Annotated[bool, typer.Option("--keep-stages", help="keep what the stages of a recipe make, in OUT.stages")]


def folder_of(output: Path) -> Path:
    """Where the stages are made: beside the output."""
    return output.with_name(f"{output.name}.stages")


def plans_of(stages: "Stages", folder: Path, **settings: Any) -> "dict[str, Plan]":
    """All plans by their stages' names, the output's under the last one, an empty name."""
    from .stages import plan_all

    plans, last = plan_all(stages, folder, **settings)
    return plans if any(last is plan for plan in plans.values()) else {**plans, "": last}


def asked(models: Sequence[str], flags: Mapping[str, Any]) -> "Stages | None":
    """The stages of a recipe file; None where it has none, or flags stand beside it."""
    if not is_file(models) or len(models) > 1 or flags:
        return None
    from .stages import read_stages

    return read_stages(Path(models[0]))


def check(keep: bool) -> None:
    """Refuse --keep-stages where there are none; raises UsageError."""
    if keep:
        raise UsageError("--keep-stages is for a recipe file of several documents; leave it out")


def merge(stages: "Stages", source: str, job: Job, *, keep: bool, greedy: object) -> None:
    """Make all stages and the output, or show their plans.

    source: the recipe file
    greedy: what --greedy says, which does not go with it

    raises: WtoolError; typer.Exit after plans are shown, and where the output is there already
    """
    if greedy:
        raise UsageError(f"{source}: --greedy chooses among the models of one merge; leave it out")
    if job.dry_run:
        raise typer.Exit(_show(stages, job))
    make = _made_before(stages, job)
    plan = planned(make, job)
    check_plan(plan, job)
    run(make, plan, job)
    if not keep:
        shutil.rmtree(folder_of(job.output), ignore_errors=True)


def _show(stages: "Stages", job: Job) -> int:
    """Print the plans of all stages; the exit code tells whether they can be carried out."""
    from wtool import options
    from wtool.console import emit, emit_json

    with tempfile.TemporaryDirectory(prefix="wtool-stages-") as folder:
        plans = plans_of(stages, Path(folder), **job.settings)
        *_, last = plans.values()
        options.draw(last, job.sketch)
        if job.as_json:
            before = {name: summary(plan, job) for name, plan in plans.items() if plan is not last}
            emit_json({**summary(last, job), "stages": before})
        else:
            for name, plan in plans.items():
                emit(f"{f'stage {name}' if name else 'output'}: {described(plan, job)}")
        return 3 if last.problems else 0


def _made_before(stages: "Stages", job: Job) -> "partial[Plan]":
    """Make all stages but the last; returns what makes the plan of the output.

    raises: WtoolError; stages that are done are there when the same command is run again. typer.Exit where the output
        is there already
    """
    from .stages import maker

    told = _record(stages, job)
    _check_output(job, told["work"])
    folder = folder_of(job.output)
    done: dict[str, Path] = {}
    for name, recipe in stages.before.items():
        _make(name, recipe, done, folder / name, job)
        done[name] = folder / name
    return maker(stages, told, folder, **job.settings)


def _record(stages: "Stages", job: Job) -> dict[str, Any]:
    """What the output's manifest tells of the stages; raises WtoolError where they cannot be made."""
    from wtool.executors.local import check_place

    from .stages import record

    with tempfile.TemporaryDirectory(prefix="wtool-stages-") as sketches:
        plans = plans_of(stages, Path(sketches), **job.settings)
        for plan in plans.values():
            plan.check()
            check_place(plan, job.output)
        return record(stages, list(plans.values()))


def _check_output(job: Job, work: str) -> None:
    """raises: OutputExists; typer.Exit where the output is what this work would make"""
    from wtool import console

    output = job.output
    if not output.exists() or job.run["force"]:
        return
    if _made_by(output) != work:
        raise OutputExists(f"{output}: there already; --force replaces it")
    if job.as_json:
        console.emit_json({"output": str(output), "already_there": True})
    else:
        console.emit(f"{output}: there already, made by these stages from these inputs (--force makes it anew)")
    raise typer.Exit


def _make(name: str, recipe: "MergeRecipe", done: Mapping[str, Path], folder: Path, job: Job) -> None:
    """Make one stage.

    done: the folders of the stages before it
    """
    from wtool import console, options

    from .planner import plan_merge

    make = partial(plan_merge, recipe, places=dict(done), **job.settings)
    plan = make(low_disk=options.downloads(job.low_disk, folder))
    for warning in plan.warnings:
        console.warn(f"stage {name}: {warning}")
    begin = time.perf_counter()
    total = sum(info.nbytes for info in plan.outputs.values())
    with console.progress(f"stage {name}", total, quiet=job.quiet) as advance:
        outcome = carry_out(job)(make, plan, folder, progress=advance)
    if not job.as_json:
        state = "there already" if outcome.already_there else f"{time.perf_counter() - begin:.1f} s"
        console.emit(f"stage {name}: {len(plan.outputs)} tensors, {state}")


def _made_by(output: Path) -> str | None:
    """The digest of the work that an output was made by."""
    from wtool.writer import MANIFEST

    try:
        told: Mapping[str, Any] = json.loads((output / MANIFEST).read_bytes()).get("stages") or {}
        return told.get("work")
    except (OSError, ValueError, AttributeError):
        return None
