"""`wtool run`: a pipeline of stages from a YAML file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import RuntimeProblem, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wtool.pipeline.forecast import Forecast
    from wtool.pipeline.jobs import Job
    from wtool.pipeline.ledger import Ledger
    from wtool.pipeline.recipe import Pipeline
    from wtool.pipeline.schedule import Schedule

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
A stage has a name, a verb and what the verb's recipe says; $name stands for another stage's output, a variable, or a
value of the matrix. Jobs that are done are known by what was asked and of which files, and are not done again; a job
that was stopped goes on where it was when the same command is run again."""


@app.command(epilog=EPILOG)
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="a YAML file of stages")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder for all outputs [default: the file's name]")
    ] = None,
    given: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a variable's value")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="come to this stage and no further")] = None,
    redo: Annotated[list[str] | None, typer.Option(metavar="STAGE", help="do it again, and what needs it")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="jobs side by side; on a cluster, at most")] = 1,
    executor: Annotated[str, typer.Option(help="local, ray, or ray:HOST:PORT of a cluster's head")] = "local",
    keep: Annotated[bool, typer.Option("--keep", help="drop no output, whatever the file says")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show every job, its size and every problem; run nothing")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a pipeline, or what is left of it."""
    from wtool.pipeline.jobs import jobs_of
    from wtool.pipeline.ledger import Ledger, keys_of
    from wtool.pipeline.recipe import read_pipeline
    from wtool.pipeline.schedule import Schedule, to_do
    from wtool.recipe_file import named_value

    asked = read_pipeline(pipeline).with_variables(dict(named_value("--set", text) for text in given or []))
    all_jobs = jobs_of(asked)
    _check_stages([*(only or []), *(redo or [])], asked)
    ledger = Ledger(output or Path(pipeline.stem))
    keys = keys_of(all_jobs, asked)
    todo = to_do(all_jobs, keys, ledger, {*(only or [])}, {*(redo or [])})
    forecasts = _forecast(asked, todo, ledger.out, quiet)
    if dry_run:
        raise typer.Exit(_show(all_jobs, todo, forecasts, ledger, as_json))
    if problem := next((f"{job.name}: {each.problem}" for job, each in forecasts.items() if each.problem), None):
        raise UsageError(f"{problem} (nothing was begun; --dry-run shows all problems)")
    schedule = Schedule(asked, all_jobs, todo, keys, ledger, at_once=jobs, keep_all=keep, quiet=quiet)
    _run(schedule, todo, ledger, executor, quiet)
    _tell(asked, all_jobs, ledger, schedule.failed, as_json)


def _check_stages(names: "Sequence[str]", asked: "Pipeline") -> None:
    from wtool.recipe_parts import known

    for name in names:
        known("stage", name, asked.stages)


def _forecast(asked: "Pipeline", todo: "Sequence[Job]", out: Path, quiet: bool) -> "dict[Job, Forecast]":
    """What plans tell of the jobs to be run, each on the sketches of those before it."""
    from tempfile import TemporaryDirectory

    from wtool.console import progress
    from wtool.pipeline.forecast import forecast

    with (
        TemporaryDirectory(prefix="wtool-") as scratch,
        progress("planning", len(todo), quiet=quiet, unit="jobs") as on,
    ):
        sketches = {job: Path(scratch, str(number)) for number, job in enumerate(todo)}
        found: dict[Job, Forecast] = {}
        for job in todo:
            found[job] = forecast(job, asked, lambda other: sketches.get(other) or _output(other, out), sketches[job])
            on(1)
    return found


def _output(job: "Job", out: Path) -> Path:
    found = job.output(out)
    assert found is not None, "figures are no files"
    return found


def _show(
    all_jobs: "Sequence[Job]",
    todo: "Sequence[Job]",
    forecasts: "Mapping[Job, Forecast]",
    ledger: "Ledger",
    as_json: bool,
) -> int:
    """Print the jobs; the exit code tells whether they can be carried out."""
    from wtool.console import emit, emit_json, table
    from wtool.pipeline.forecast import row

    rows = [row(job, forecasts.get(job), ledger) for job in all_jobs]
    problems = [f"{job.name}: {each.problem}" for job, each in forecasts.items() if each.problem]
    if as_json:
        emit_json({"jobs": rows, "to_run": [job.name for job in todo], "problems": problems})
    else:
        columns = ["job", "verb", "needs", "state", "size", "memory", "time"]
        table(None, columns, [_cells(each) for each in rows])
        for problem in problems:
            emit(f"problem: {problem}")
        done = len(all_jobs) - len(todo)
        emit(f"{len(todo)} of {len(all_jobs)} jobs are to be run{f', {done} are done' if done else ''}")
        emit("this pipeline cannot be carried out" if problems else "no problem found")
    return 3 if problems else 0


def _cells(row: "Mapping[str, Any]") -> list[str]:
    from wtool.console import human_bytes

    size, memory = ("" if row.get(key) is None else human_bytes(row[key]) for key in ("bytes", "memory_bytes"))
    time = "" if row.get("seconds") is None else human_time(row["seconds"])
    return [row["job"], row["verb"], ", ".join(row["needs"]), row["state"], size, memory, time]


def human_time(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _run(schedule: "Schedule", todo: "Sequence[Job]", ledger: "Ledger", executor: str, quiet: bool) -> None:
    """Carry out what is left, where it is wanted, while nobody else does."""
    import os
    from contextlib import nullcontext

    from wtool.console import remark
    from wtool.executors.cluster import address_of
    from wtool.pipeline.ledger import Entry
    from wtool.pipeline.process import on_cluster, run_here
    from wtool.writer import disk_errors, take_lock

    numbers = {job: f"[{number}/{len(todo)}]" for number, job in enumerate(todo, 1)}

    def begins(job: "Job") -> None:
        if not quiet:
            remark(f"{numbers[job]} {job.name}: {job.verb}")

    def ends(job: "Job", entry: Entry) -> None:
        if not quiet or entry.error:
            remark(f"{numbers[job]} {job.name}: {entry.error or f'done in {human_time(entry.seconds)}'}")

    with disk_errors(ledger.out):
        (ledger.out / ".jobs").mkdir(parents=True, exist_ok=True)
    lock = take_lock(ledger.out / ".jobs", ledger.out)
    try:
        with nullcontext(run_here) if executor == "local" else on_cluster(address_of(executor)) as run:
            schedule.carry_out(run, begins, ends)
    finally:
        os.close(lock)


def _tell(
    asked: "Pipeline", all_jobs: "Sequence[Job]", ledger: "Ledger", failed: "Mapping[Job, str]", as_json: bool
) -> None:
    from wtool.console import emit, emit_json, table
    from wtool.pipeline.results import as_csv, results, shown
    from wtool.shards import json_bytes

    rows = results(asked, all_jobs, ledger, failed)
    (ledger.out / "results.csv").write_text(as_csv(rows), encoding="utf-8")
    (ledger.out / "results.json").write_bytes(json_bytes(rows))
    if as_json:
        emit_json({"output": str(ledger.out), "results": rows})
    else:
        table(None, *shown(rows, list(asked.matrix)))
        emit(f"{ledger.out}: results.csv, results.json")
    if failed:
        first, why = next(iter(failed.items()))
        raise RuntimeProblem(f"{len(failed)} of {len(all_jobs)} jobs failed or could not be begun; {first.name}: {why}")
