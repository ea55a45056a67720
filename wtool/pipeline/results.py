"""What a pipeline made, as a table: sizes, times, and what the evaluations say of each checkpoint."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .jobs import Job, content_of
from .ledger import Ledger
from .recipe import Pipeline

MEASURES = (("perplexity", "perplexity"), ("divergence", "KL"), ("agreement", "top-1"))


def results(pipeline: Pipeline, jobs: Sequence[Job], ledger: Ledger, failed: Mapping[Job, str]) -> list[dict[str, Any]]:
    """A row for every job that makes a file, and for every evaluation of a checkpoint that no job made."""
    rows: dict[Job, dict[str, Any]] = {}
    for job in jobs:
        entry = ledger.read(job)
        error = failed.get(job) or (entry.error if entry else None)
        row = {"stage": job.stage, **job.values, "status": "failed" if error else "done" if entry else "not run"}
        if error:
            row["error"] = error
        if entry:
            row |= {"seconds": round(entry.seconds, 2), "bytes": entry.bytes, "peak_memory_bytes": entry.peak_bytes}
        subject = _evaluated(job, pipeline)
        if subject is None or error or subject not in rows:
            rows[job] = row
        if entry and not error and job.verb == "eval":
            rows[subject if subject in rows else job] |= _quality(entry.figures)
    return list(rows.values())


def _evaluated(job: Job, pipeline: Pipeline) -> Job | None:
    """The job whose output an evaluation is of."""
    if job.verb != "eval":
        return None
    content = content_of(job, pipeline, lambda other: f"job:{other.name}")
    return next((each for each in job.needs if content.get("checkpoint") == f"job:{each.name}"), None)


def _quality(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation, by text and measure."""
    found: dict[str, float] = {}
    for text in figures.get("texts", ()):
        name = Path(text["file"]).stem
        found |= {f"{name} {told}": text[key] for key, told in MEASURES if text.get(key) is not None}
    return found


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def shown(rows: Sequence[Mapping[str, Any]], matrix: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells for people: what differs, what it costs, how good it is."""
    from wtool.console import human_bytes

    known = ("stage", "status", "error", "seconds", "bytes", "peak_memory_bytes", *matrix)
    axes = [axis for axis in matrix if any(axis in row for row in rows)]
    quality = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in known]
    cells = []
    for row in rows:
        size, memory = ("" if row.get(key) is None else human_bytes(row[key]) for key in ("bytes", "peak_memory_bytes"))
        time = "" if row.get("seconds") is None else f"{row['seconds']:.1f} s"
        state = "" if row["status"] == "done" else row["status"]
        figures = [_figure(key, row.get(key)) for key in quality]
        cells.append([row["stage"], *(str(row.get(axis, "")) for axis in axes), state, size, time, memory, *figures])
    columns = ["stage", *axes, "", "size", "time", "memory", *quality]
    return columns, cells


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if key.endswith("top-1") else f"{value:.3f}" if key.endswith("KL") else f"{value:.2f}"
