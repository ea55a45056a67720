"""A figure of every linear as a picture: a row a block, a column a place in the block, dark on light and back.

A cell of several linears (experts) shows the worst of them. Its number stands in it, in the unit that the foot tells,
so nothing is told by colour alone. The colours are the page's (`style`), so that they follow its theme.
"""

from collections.abc import Sequence
from html import escape
from math import isfinite

from wtool.report.figures import Linear, Stack
from wtool.report.measures import Measure
from wtool.report.scale import STEPS, Scale

WIDTH = 300  # units; a phone shows about one a pixel
LEFT, CELL, GAP = 22, 15, 1.5
LETTER = 5.6  # units wide
NARROWEST, WIDEST = 18, 40  # units of a column
FOOT = 34


def heatmap(stack: Stack, measure: Measure, scale: Scale) -> str:
    """The picture of a stack of blocks."""
    width = min(WIDEST, max(NARROWEST, (WIDTH - LEFT) / len(stack.places)))
    labels = short_names(stack.places)
    top = 12 + 0.62 * LETTER * max(map(len, labels))
    total = max(200.0, LEFT + width * len(stack.places) + 0.75 * LETTER * len(labels[-1]))
    bottom = top + CELL * len(stack.blocks) + 4
    parts = [
        f'<text class="place" transform="translate({LEFT + width * (column + 0.5):.1f} {top - 6:.1f}) rotate(-40)">'
        f"<title>{escape(place)}</title>{escape(label)}</text>"
        for column, (place, label) in enumerate(zip(stack.places, labels, strict=True))
    ]
    every = 1 if len(stack.blocks) <= 48 else 5
    for row, block in enumerate(stack.blocks):
        y = top + CELL * row
        if block % every == 0:
            parts.append(f'<text class="block" x="{LEFT - 5}" y="{y + CELL - 4:.1f}">{block}</text>')
        for column, place in enumerate(stack.places):
            if theirs := stack.cells.get((block, place)):
                parts.append(_cell(theirs, measure, scale, LEFT + width * column, y, width))
    marked = any(each.fallback for theirs in stack.cells.values() for each in theirs)
    return (
        f'<svg class="heatmap" viewBox="0 0 {total:.0f} {bottom + FOOT:.0f}" '
        f'style="min-width:{total * 0.9:.0f}px;max-width:{total * 1.4:.0f}px" role="img" '
        f'aria-label="{escape(f"{measure.name} of each layer of {stack.name}")}">'
        + "".join(parts)
        + _foot(measure, scale, bottom, marked)
        + "</svg>"
    )


def short_names(places: Sequence[str]) -> list[str]:
    """The last part of each place's name, with as many before it as tell it from the others."""
    parts = [[part for part in place.split(".") if part != "*"] for place in places]

    def short(own: list[str]) -> str:
        for count in range(1, len(own)):
            if sum(other[-count:] == own[-count:] for other in parts) == 1:
                return ".".join(own[-count:])
        return ".".join(own)

    return [short(own) for own in parts]


def brief(value: float, scale: Scale) -> str:
    """A figure in the scale's unit, in few signs."""
    whole = round(value * scale.unit[1])
    return f"{whole}".replace("-", "−") if abs(whole) < 1000 else "…"


def _cell(theirs: tuple[Linear, ...], measure: Measure, scale: Scale, x: float, y: float, width: float) -> str:
    shown = measure.worst(theirs)
    value = measure.of(shown)
    if value is None:
        colour, number = "none", ""
    elif not isfinite(value):
        colour, number = "bad", "!"
    else:
        colour, number = f"c{scale.step(value)}", brief(value, scale)
    box = f'<rect class="{colour}" x="{x:.1f}" y="{y:.1f}" width="{width - GAP:.1f}" height="{CELL - GAP:.1f}" rx="2"/>'
    ink = f'<text class="n n{colour}" x="{x + (width - GAP) / 2:.1f}" y="{y + CELL - 4.5:.1f}">{number}</text>'
    mark = any(each.fallback for each in theirs)
    dot = f'<circle class="mark" cx="{x + 3:.1f}" cy="{y + 3:.1f}" r="2.2"/>' if mark else ""
    told = escape(_told(shown, measure, len(theirs)))
    return f"<g><title>{told}</title>{box}{ink if number else ''}{dot}</g>"


def _foot(measure: Measure, scale: Scale, y: float, marked: bool) -> str:
    """The colours with their figures, and the unit of the numbers."""
    name, many = scale.unit
    size = 13
    parts = [
        f'<rect class="c{number}" x="{LEFT + size * number}" y="{y + 4:.1f}" width="{size}" height="9">'
        f"<title>{begin:.4g} to {end:.4g}</title></rect>"
        for number, (begin, end) in enumerate(zip(scale.edges(), scale.edges()[1:], strict=False))
    ]
    low, high = (f"{edge * many:.3g}".replace("-", "−") for edge in (scale.low, scale.high))
    parts.append(f'<text x="{LEFT}" y="{y + 25:.1f}">{low} to {high} {name} ({measure.name})</text>')
    if marked:
        x = LEFT + size * STEPS + 12
        parts.append(f'<circle class="mark" cx="{x}" cy="{y + 8:.1f}" r="2.2"/>')
        parts.append(f'<text x="{x + 6}" y="{y + 12:.1f}">fallback</text>')
    return "".join(parts)


def _told(shown: Linear, measure: Measure, count: int) -> str:
    lines = [shown.module if count == 1 else f"{shown.module}, the worst of {count}"]
    if shown.output_error is not None:
        plain, how = (
            (shown.rtn_output_error, "by rounding")
            if shown.cut_output_error is None
            else (shown.cut_output_error, "only cut")
        )
        lines.append(f"output error {shown.output_error:.4f}" + ("" if plain is None else f" ({how} {plain:.4f})"))
    if shown.weight_error is not None:
        lines.append(f"weight error {shown.weight_error:.4f}")
    value = measure.of(shown)
    if value is not None and "error" not in measure.name:
        lines.append(f"{measure.name} {value:.4f}")
    lines += [f"{shown.bits} bits"] if shown.bits is not None else []
    lines += [f"fallback: {shown.fallback}"] if shown.fallback else []
    return "\n".join(lines)
