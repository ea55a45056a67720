"""The first part of a page on several checkpoints: one row each."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from wtool.console import human_bytes
from wtool.report import asked
from wtool.report.figures import linears, middle
from wtool.report.quality import Score
from wtool.report.sizes import share


def table(named: Sequence[tuple[str, Mapping[str, Any]]], scores: Sequence[Score]) -> str:
    """A row for each checkpoint: what was done, its size, its error, and its quality on every text.

    named: the checkpoints' names and manifests
    """
    rows = [_cells(name, manifest, scores) for name, manifest in named]
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(row.get(key) or '–')}</td>" for key in columns) + "</tr>" for row in rows
    )
    return (
        f'<section class="compared"><h2>Side by side</h2><div class="scroll" tabindex="0">'
        f"<table><tr>{head}</tr>{body}</table></div></section>"
    )


def _cells(name: str, manifest: Mapping[str, Any], scores: Sequence[Score]) -> dict[str, str | None]:
    summary = manifest.get("summary")
    summary = summary if isinstance(summary, Mapping) else {}
    before, after = summary.get("bytes_before"), summary.get("bytes_after")
    found = linears(manifest)
    outputs, weights = middle([each.output_error for each in found]), middle([each.weight_error for each in found])
    cells: dict[str, str | None] = {
        "checkpoint": name,
        "what": asked.sentence(manifest),
        "weights": human_bytes(after) if isinstance(after, int) else None,
        "of before": share(after, before) if isinstance(after, int) and isinstance(before, int) and before else None,
        "output error": None if outputs is None else f"{outputs:.4f}",
        "weight error": None if weights is None else f"{weights:.4f}",
    }
    for each in scores:
        if each.is_of(name):
            cells[f"{each.text}: perplexity"] = f"{each.perplexity:.3f}"
            cells[f"{each.text}: KL"] = None if each.divergence is None else f"{each.divergence:.4f}"
    return cells
