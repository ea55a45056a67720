"""The error of every linear as a picture: a row a block, a column a place in the block, dark on light and back.

The scale is logarithmic. A cell of several linears (experts) shows the worst of them. The colours are the page's
(`style`), so that they follow its theme.
"""

from collections.abc import Sequence
from html import escape
from math import exp, isfinite, log, sqrt

from wtool.report.figures import Linear, Stack, worst

STEPS = 9  # colours
SPAN = 4  # from the smallest to the largest error of a scale, at least
WIDTH = 300  # units; a phone shows about one a pixel
LEFT, CELL, GAP = 22, 15, 1.5
LETTER = 5.6  # units wide
NARROWEST, WIDEST = 16, 40  # units of a column


def bounds(found: Sequence[Linear]) -> tuple[float, float] | None:
    """Where the scale begins and ends; None where there is nothing to show.

    From the smallest to the largest error, and at least a factor of SPAN: linears that are alike are to look alike.
    """
    errors = [each.error for each in found if each.error is not None and isfinite(each.error) and each.error > 0]
    if not errors:
        return None
    low, high = min(errors), max(errors)
    wider = max(1.0, sqrt(SPAN * low / high))
    return low / wider, high * wider


def step(error: float, low: float, high: float) -> int:
    """The colour of an error, 0 to STEPS - 1."""
    if error <= low:
        return 0
    return min(STEPS - 1, int(STEPS * log(error / low) / log(high / low)))


def edges(low: float, high: float) -> list[float]:
    """Where the colours meet: STEPS + 1 errors from `low` to `high`."""
    return [low * exp(log(high / low) * number / STEPS) for number in range(STEPS + 1)]


def heatmap(stack: Stack, low: float, high: float) -> str:
    """The picture of a stack of blocks, with the scale from `low` to `high`."""
    width = min(WIDEST, max(NARROWEST, (WIDTH - LEFT) / len(stack.places)))
    labels = short_names(stack.places)
    top = 12 + 0.62 * LETTER * max(map(len, labels))
    total = LEFT + width * len(stack.places) + 0.75 * LETTER * len(labels[-1])
    height = top + CELL * len(stack.blocks) + 4
    every = 1 if len(stack.blocks) <= 48 else 5
    parts = [
        f'<text class="place" transform="translate({LEFT + width * (column + 0.5):.1f} {top - 6:.1f}) rotate(-40)">'
        f"<title>{escape(place)}</title>{escape(label)}</text>"
        for column, (place, label) in enumerate(zip(stack.places, labels, strict=True))
    ]
    for row, block in enumerate(stack.blocks):
        y = top + CELL * row
        if block % every == 0:
            parts.append(f'<text class="block" x="{LEFT - 5}" y="{y + CELL - 4:.1f}">{block}</text>')
        for column, place in enumerate(stack.places):
            if theirs := stack.cells.get((block, place)):
                parts.append(_cell(theirs, LEFT + width * column, y, width, low, high))
    return (
        f'<svg class="heatmap" viewBox="0 0 {total:.0f} {height:.0f}" style="max-width:{total * 1.4:.0f}px" '
        f'role="img" aria-label="error of each linear layer of {escape(stack.name, quote=True)}">'
        + "".join(parts)
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


def _cell(theirs: tuple[Linear, ...], x: float, y: float, width: float, low: float, high: float) -> str:
    shown = worst(theirs)
    colour = (
        "none" if shown.error is None else "bad" if not isfinite(shown.error) else f"c{step(shown.error, low, high)}"
    )
    fallback = any(each.fallback for each in theirs)
    box = f'<rect class="{colour}" x="{x:.1f}" y="{y:.1f}" width="{width - GAP:.1f}" height="{CELL - GAP:.1f}" rx="2"/>'
    mark = f'<circle class="mark" cx="{x + width / 2:.1f}" cy="{y + CELL / 2 - 1:.1f}" r="2.6"/>' if fallback else ""
    return f"<g><title>{escape(_told(shown, len(theirs)))}</title>{box}{mark}</g>"


def _told(shown: Linear, count: int) -> str:
    lines = [shown.module if count == 1 else f"{shown.module}, the worst of {count}"]
    if shown.output_error is not None:
        by_rounding = "" if shown.rtn_output_error is None else f" (by rounding {shown.rtn_output_error:.4f})"
        lines.append(f"output error {shown.output_error:.4f}{by_rounding}")
    if shown.weight_error is not None:
        lines.append(f"weight error {shown.weight_error:.4f}")
    if shown.bits is not None:
        lines.append(f"{shown.bits} bits")
    if shown.fallback:
        lines.append(f"rounded only: {shown.fallback}")
    return "\n".join(lines)
