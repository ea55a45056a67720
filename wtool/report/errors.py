"""The parts of the page that tell how far each linear moved."""

from collections.abc import Sequence
from html import escape
from math import isfinite

from wtool.report.figures import Linear, badness, stacks
from wtool.report.heatmap import STEPS, bounds, edges, heatmap

WORST = 10
LISTED = 1000  # linears in the full table


def pictures(found: Sequence[Linear]) -> str:
    """A heatmap for each stack of blocks."""
    scale = bounds(found)
    blocks, outside = stacks(found)
    if scale is None or not blocks:
        return ""
    of_output = any(each.output_error is not None for each in found)
    explained = (
        "How far a layer's output on the calibration tokens moved, relative to its size."
        if of_output
        else "How far a layer's weights moved, relative to their size."
    )
    more = f" Not in a block: {', '.join(each.module for each in outside)}." if outside else ""
    drawn = "".join(
        (f"<h3>{escape(stack.name)}</h3>" if len(blocks) > 1 else "") + heatmap(stack, *scale) for stack in blocks
    )
    return (
        f"<section><h2>{'Output' if of_output else 'Weight'} error, block by block</h2>"
        f'<p class="soft small">{explained}{escape(more)}</p>'
        f"{_legend(*scale, any(each.fallback for each in found))}{drawn}</section>"
    )


def _legend(low: float, high: float, marked: bool) -> str:
    marks = edges(low, high)
    swatches = "".join(
        f'<i class="c{number}" title="{marks[number]:.4f} to {marks[number + 1]:.4f}"></i>' for number in range(STEPS)
    )
    dot = '<span><i class="dot"></i>rounded only</span>' if marked else ""
    return f'<div class="legend"><span>{low:.4f} {swatches} {high:.4f}</span>{dot}</div>'


def worst_table(found: Sequence[Linear]) -> str:
    """The linears that moved most."""
    known = [each for each in found if each.error is not None]
    if not known:
        return ""
    first = sorted(known, key=lambda each: (-badness(each), each.module))[:WORST]
    title = "The worst layer" if len(first) == 1 else f"The {len(first)} worst layers"
    told = _table(first, ("output error", "by rounding", "weight error"))
    return f"<section><h2>{title}</h2>{told}</section>"


def fallbacks(found: Sequence[Linear]) -> str:
    """The linears that the method was not applied to, and why."""
    theirs = [each for each in found if each.fallback]
    if not theirs:
        return ""
    items = "".join(f"<li><code>{broken(each.module)}</code>: {escape(each.fallback or '')}</li>" for each in theirs)
    told = f"<ul>{items}</ul>"
    if len(theirs) > WORST:
        told = f"<details><summary>{len(theirs):,} layers</summary>{told}</details>"
    return (
        '<section><h2>Rounded only</h2><p class="soft small">The method could not be applied to these.</p>'
        f"{told}</section>"
    )


def broken(name: str) -> str:
    """A module's name, escaped, that may go on in the next line after a dot."""
    return escape(name).replace(".", ".<wbr>")


def all_linears(found: Sequence[Linear]) -> str:
    """Every linear with all that is known of it, folded away."""
    if not found:
        return ""
    columns = ("output error", "by rounding", "weight error", "bits", "group", "damping", "tokens")
    more = f'<p class="soft">The first {LISTED:,} of {len(found):,}.</p>' if len(found) > LISTED else ""
    return (
        f"<section><details><summary>All {len(found):,} quantized layers</summary>"
        f"{more}{_table(found[:LISTED], columns)}</details></section>"
    )


def _table(rows: Sequence[Linear], columns: Sequence[str]) -> str:
    """A table of linears; a column of which nothing is known is left out."""
    told = [_cells(each) for each in rows]
    shown = [column for column in columns if any(cells[column] is not None for cells in told)]
    head = "".join(f'<th scope="col">{column}</th>' for column in ("layer", *shown))
    lines = [
        f"<td>{broken(each.module)}</td>" + "".join(f"<td>{cells[column] or '–'}</td>" for column in shown)
        for each, cells in zip(rows, told, strict=True)
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _cells(each: Linear) -> dict[str, str | None]:
    return {
        "output error": _figure(each.output_error),
        "by rounding": _figure(each.rtn_output_error),
        "weight error": _figure(each.weight_error),
        "bits": None if each.bits is None else str(each.bits),
        "group": None if each.group_size is None else "row" if each.group_size == -1 else str(each.group_size),
        "damping": None if each.damping is None else f"{each.damping:g}",
        "tokens": None if each.tokens is None else f"{each.tokens:,}",
    }


def _figure(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.4f}" if isfinite(value) else "not finite"
