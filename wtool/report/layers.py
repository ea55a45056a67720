"""The parts of the page that tell how each linear fared."""

from collections.abc import Sequence
from html import escape
from math import isfinite

from wtool.report.figures import Linear, stacks
from wtool.report.heatmap import heatmap
from wtool.report.measures import OUTPUT, Measure, shown
from wtool.report.scale import scale_of

WORST = 10
LISTED = 1000  # linears in the full table


def drawings(found: Sequence[Linear]) -> list[tuple[Measure, list[tuple[str, str]]]]:
    """The heatmaps of each measure: of every stack of blocks its name and its picture."""
    blocks, _ = stacks(found)
    drawn = []
    for measure in shown(found):
        scale = scale_of((measure.of(each) for each in found), logarithmic=measure.logarithmic)
        if scale is not None and blocks:
            drawn.append((measure, [(stack.name, heatmap(stack, measure, scale)) for stack in blocks]))
    return drawn


def pictures(found: Sequence[Linear]) -> list[str]:
    """A section for each measure, with its heatmaps."""
    _, outside = stacks(found)
    more = f" Not in a block: {', '.join(each.module for each in outside)}." if outside else ""
    return [
        f'<section><h2>{measure.title}</h2><p class="soft small">{measure.explained}{escape(more)}</p>'
        + "".join(
            (f"<h3>{escape(name)}</h3>" if len(drawn) > 1 else "") + f'<div class="scroll" tabindex="0">{picture}</div>'
            for name, picture in drawn
        )
        + "</section>"
        for measure, drawn in drawings(found)
    ]


def worst_table(found: Sequence[Linear]) -> str:
    """The linears that are off most: by error, and where there is none by what is drawn first."""
    measure = next(iter(shown(found)), OUTPUT)
    known = [each for each in found if measure.of(each) is not None]
    if not known:
        return ""
    first = sorted(known, key=lambda each: (-measure.badness(each), each.module))[:WORST]
    title = "The worst layer" if len(first) == 1 else f"The {len(first)} worst layers"
    columns = (
        "output error",
        "by rounding",
        "only cut",
        "weight error",
        "conflict",
        "cosine",
        "moved",
        "change",
        "untouched",
        "kept",
    )
    return f"<section><h2>{title}</h2>{_table(first, columns)}</section>"


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
        '<section><h2>Fallbacks</h2><p class="soft small">The method could not be applied to these.</p>'
        f"{told}</section>"
    )


def broken(name: str) -> str:
    """A module's name, escaped, that may go on in the next line after a dot."""
    return escape(name).replace(".", ".<wbr>")


def all_linears(found: Sequence[Linear], done: str) -> str:
    """Every linear with all that is known of it, folded away.

    done: what was done to them, in a word
    """
    if not found:
        return ""
    more = f'<p class="soft">The first {LISTED:,} of {len(found):,}.</p>' if len(found) > LISTED else ""
    return (
        f"<section><details><summary>All {len(found):,} {escape(done)} layers</summary>"
        f"{more}{_table(found[:LISTED], tuple(_cells(found[0])))}</details></section>"
    )


def _table(rows: Sequence[Linear], columns: Sequence[str]) -> str:
    """A table of linears; a column of which nothing is known is left out."""
    told = [_cells(each) for each in rows]
    known = [column for column in columns if any(cells[column] is not None for cells in told)]
    head = "".join(f'<th scope="col">{column}</th>' for column in ("layer", *known))
    lines = [
        f"<td>{broken(each.module)}</td>" + "".join(f"<td>{cells[column] or '–'}</td>" for column in known)
        for each, cells in zip(rows, told, strict=True)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div>'


def _cells(each: Linear) -> dict[str, str | None]:
    return {
        "output error": _figure(each.output_error),
        "by rounding": _figure(each.rtn_output_error),
        "only cut": _figure(each.cut_output_error),
        "weight error": _figure(each.weight_error),
        "conflict": _figure(each.conflict),
        "cosine": _figure(each.cosine),
        "moved": _figure(each.moved),
        "change": _figure(each.change),
        "untouched": None if each.untouched is None else f"{each.untouched:.1%}",
        "kept": None if each.kept is None else f"{each.kept:.1%}",
        "zeros": None if each.sparsity is None else f"{each.sparsity:.1%}",
        "rank": None if each.rank is None else f"{each.rank:,}",
        "bits": None if each.bits is None else str(each.bits),
        "group": None if each.group_size is None else "row" if each.group_size == -1 else str(each.group_size),
        "damping": None if each.damping is None else f"{each.damping:g}",
        "tokens": None if each.tokens is None else f"{each.tokens:,}",
    }


def _figure(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.4f}" if isfinite(value) else "not finite"
