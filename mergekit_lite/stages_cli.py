"""`wtool merge` of a file with several documents: plans shown together, stages made one after the other."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool.errors import OutputExists

if TYPE_CHECKING:
    from wtool.plan import Plan

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
    if not models[0].endswith((".yml", ".yaml")) or len(models) > 1 or flags:
        return None
    from .stages import read_stages

    return read_stages(Path(models[0]))


def show(
    stages: "Stages",
    *,
    draw: "Callable[[Plan], None]",
    describe: "Callable[[Plan], str]",
    summary: "Callable[[Plan], dict[str, Any]]",
    as_json: bool,
    **settings: Any,
) -> int:
    """Print the plans of all stages; the exit code tells whether they can be carried out.

    draw:     what is done with the output's plan
    describe: a plan in words
    summary:  a plan in figures
    settings: of `plan_merge`
    """
    from wtool.console import emit, emit_json

    with tempfile.TemporaryDirectory(prefix="wtool-stages-") as folder:
        plans = plans_of(stages, Path(folder), **settings)
        *_, last = plans.values()
        if not last.problems:
            draw(last)
        if as_json:
            before = {name: summary(plan) for name, plan in plans.items() if plan is not last}
            emit_json({**summary(last), "stages": before})
        else:
            for name, plan in plans.items():
                emit(f"{f'stage {name}' if name else 'output'}: {describe(plan)}")
        return 3 if last.problems else 0


def make(
    stages: "Stages",
    output: Path,
    run: Callable[..., Any],
    *,
    downloads: Callable[[Path], Path | None],
    force: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> "partial[Plan]":
    """Make all stages but the last; returns what makes the plan of the output.

    run:       carries out a plan: of (what makes it, the plan, the folder, progress=)
    downloads: where the shards of models on the Hub are kept while a folder is made; None is the cache
    settings:  of `plan_merge`

    raises: WtoolError; stages that are done are there when the same command is run again. typer.Exit where the output
        is there already
    """
    from wtool import console
    from wtool.executors.local import check_place

    from .planner import plan_merge
    from .stages import maker, record

    with tempfile.TemporaryDirectory(prefix="wtool-stages-") as sketches:
        plans = plans_of(stages, Path(sketches), **settings)
        for plan in plans.values():
            plan.check()
            check_place(plan, output)
        told = record(stages, list(plans.values()))
    if output.exists() and not force:
        if _made_by(output) == told["work"]:
            _tell_it_is_there(output, as_json)
            raise typer.Exit
        raise OutputExists(f"{output}: there already; --force replaces it")
    folder = folder_of(output)
    done: dict[str, Path] = {}
    for name, recipe in stages.before.items():
        made = partial(plan_merge, recipe, places=dict(done), **settings)
        plan = made(low_disk=downloads(folder / name))
        for warning in plan.warnings:
            console.warn(f"stage {name}: {warning}")
        begin = time.perf_counter()
        total = sum(info.nbytes for info in plan.outputs.values())
        with console.progress(f"stage {name}", total, quiet=quiet) as advance:
            outcome = run(made, plan, folder / name, progress=advance)
        if not as_json:
            state = "there already" if outcome.already_there else f"{time.perf_counter() - begin:.1f} s"
            console.emit(f"stage {name}: {len(plan.outputs)} tensors, {state}")
        done[name] = folder / name
    return maker(stages, told, folder, **settings)


def done(output: Path, keep: bool) -> None:
    """The stages are not needed any more."""
    if not keep:
        shutil.rmtree(folder_of(output), ignore_errors=True)


def _tell_it_is_there(output: Path, as_json: bool) -> None:
    from wtool import console

    if as_json:
        console.emit_json({"output": str(output), "already_there": True})
    else:
        console.emit(f"{output}: there already, made by these stages from these inputs (--force makes it anew)")


def _made_by(output: Path) -> str | None:
    """The digest of the work that an output was made by."""
    from wtool.writer import MANIFEST

    try:
        told: Mapping[str, Any] = json.loads((output / MANIFEST).read_bytes()).get("stages") or {}
        return told.get("work")
    except (OSError, ValueError, AttributeError):
        return None
