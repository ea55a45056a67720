"""Every job planned before the first is run, on sketches of what the jobs before it will make."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from wtool.cli import load
from wtool.errors import UsageError, WtoolError

from .command import arguments, command_of
from .jobs import Job, content_of
from .ledger import Ledger
from .recipe import VERBS, Pipeline

# Rough figures for the time of a job, where a machine's own are not measured on the spot
START = 5.0  # seconds to import what a verb needs
BYTES_A_SECOND = 5e8  # read, computed on and written
EFFICIENCY = 0.5  # of a model's arithmetic beside that of one large product


@dataclass(frozen=True)
class Forecast:
    """What a plan tells of a job."""

    figures: Mapping[str, Any] = field(default_factory=dict)  # as the verb's --dry-run --json tells them
    problem: str | None = None  # why it cannot be done
    unknown: str | None = None  # why nothing can be told yet


def forecast(job: Job, pipeline: Pipeline, folder: Callable[[Job], Path], sketch: Path) -> Forecast:
    """Plan a job; nothing is read but headers.

    folder: where the output of a job that this one needs is, or its sketch
    sketch: where to put this one's
    """
    read = [each for each in job.needs if VERBS[each.verb].makes in ("checkpoint", "folder")]
    missing = next((each for each in read if not folder(each).exists()), None)
    try:
        given = arguments(job, pipeline, lambda other: str(folder(other)), sketch.with_name(f"{sketch.name}.yml"))
        if missing is None and VERBS[job.verb].makes == "checkpoint":
            return _planned([*given, "--json", "--sketch", str(sketch)])
        _check(job, given, content_of(job, pipeline, lambda other: str(folder(other))))
    except WtoolError as error:
        return Forecast(problem=str(error))
    return Forecast(unknown=f"when '{missing.name}' is there" if missing else None)


def _planned(given: list[str]) -> Forecast:
    verb, *rest = given
    told = StringIO()
    with redirect_stdout(told), redirect_stderr(StringIO()), _in_our_words():
        load(verb)(args=rest, prog_name=f"wtool {verb}", standalone_mode=False)
    figures = json.loads(told.getvalue())
    return Forecast(figures, problem=next(iter(figures.get("problems") or ()), None))


def _check(job: Job, given: list[str], content: Mapping[str, Any]) -> None:
    """What can be told of a command from itself alone.

    raises: UsageError
    """
    verb, *rest = given
    ending = ["-o", "out"] if VERBS[verb].makes in ("folder", "page") else []
    with _in_our_words():
        command_of(verb).make_context(f"wtool {verb}", [*rest, *ending])
    texts = content.get("text", ())
    for text in [texts] if isinstance(texts, str) else texts:
        if not Path(text).is_file():
            raise UsageError(f"stage '{job.stage}': {text}: no such text file")


class _in_our_words:
    """Complaints of the command line's library as ours."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and hasattr(error, "format_message"):
            raise UsageError(error.format_message()) from None  # type: ignore[attr-defined]


def row(job: Job, planned: Forecast | None, ledger: Ledger) -> dict[str, Any]:
    """A job as a plan shows it.

    planned: None where it is done
    """
    entry = ledger.read(job)
    told: dict[str, Any] = {"job": job.name, "verb": job.verb, "needs": [each.name for each in job.needs]}
    if planned is None:
        size = entry.bytes if entry else None
        return {**told, "state": "dropped" if entry and entry.is_dropped else "done", "bytes": size, "seconds": None}
    state = "cannot be done" if planned.problem else planned.unknown or "to be run"
    figures = planned.figures
    trained = [figures[key] for key in ("bytes_of_student", "bytes_of_teacher") if figures.get(key)]
    return {
        **told,
        "state": state,
        "bytes": figures.get("bytes_after", figures.get("bytes_to_write")),
        "memory_bytes": figures.get("peak_memory_bytes", sum(trained) or None),
        "seconds": _seconds(figures) if figures else None,
    }


def _seconds(figures: Mapping[str, Any]) -> float:
    """About how long a job takes on this machine."""
    moved = figures.get("bytes_to_read", 0) + figures.get("bytes_to_write", 0)
    return round(START + moved / BYTES_A_SECOND + figures.get("flops", 0) / (EFFICIENCY * _flops_a_second()), 1)


@cache
def _flops_a_second() -> float:
    """What float32 products reach here: the best of a few large ones."""
    import torch

    left = torch.ones(1024, 1024)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        torch.mm(left, left)
        times.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(times)
