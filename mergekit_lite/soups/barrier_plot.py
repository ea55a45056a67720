"""A picture of the loss on the straight lines between models, in the style of the report: SVG, PNG or a page."""

import re
from collections.abc import Sequence
from html import escape
from math import floor, isfinite, log10
from pathlib import Path

from wtool.errors import OutputError, UsageError
from wtool.report.plots import png
from wtool.report.style import CSS, LIGHT, PICTURE
from wtool.writer import disk_errors

from .barrier import Line

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
KINDS = (".svg", ".png", ".html")
TICKS = 5  # at most, of the losses


def check_kind(path: Path) -> None:
    """Refuse a file of another kind, and one in a folder that is not there.

    raises: UsageError, OutputError
    """
    if path.suffix not in KINDS:
        raise UsageError(f"--plot {path}: the file's ending tells its kind: {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")


def save(path: Path, named: Sequence[tuple[str, str, Line]], what: str) -> None:
    """Write pictures of lines, one above the other.

    named: of each line the names of its ends
    what: the texts it was measured on

    raises: OutputError, RuntimeProblem where a PNG is asked for and resvg-py is not installed
    """
    drawn = [picture(line, first, second) for first, second, line in named]
    if path.suffix == ".html":
        content = _page(named, drawn, what).encode()
    else:
        whole = _stacked(drawn)
        content = png(whole) if path.suffix == ".png" else _alone(whole).encode()
    with disk_errors(path):
        path.write_bytes(content)


def picture(line: Line, first: str, second: str) -> str:
    """The losses over the share of the second model, the line between the ends' losses, the lowest and the top point.

    first, second: names of the ends
    """
    known = [loss for loss in line.losses if isfinite(loss)] or [0.0]
    ticks = _ticks(min(known), max(known))
    low, high = min(*known, ticks[0]), max(*known, ticks[-1])
    span = (high - low) or 1.0

    def place(share: float, loss: float) -> tuple[float, float]:
        return LEFT + share * (WIDTH - LEFT - RIGHT), TOP + (high - loss) / span * (HEIGHT - TOP - BOTTOM)

    points = [place(*point) for point in zip(line.shares, line.losses, strict=True) if isfinite(point[1])]
    parts = [_axis_y(place(0, tick)[1], _name(tick, ticks)) for tick in ticks]
    parts += [_axis_x(place(share, low)[0], f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts += _words(first, second)
    if isfinite(line.losses[0]) and isfinite(line.losses[-1]):
        ends = f"M{_at(points[0])}L{_at(points[-1])}"
        parts.append(f'<path class="line" stroke-opacity="0.4" stroke-dasharray="4 4" d="{ends}"/>')
    parts.append(f'<polyline class="line" points="{" ".join(map(_at, points))}"/>')
    if isfinite(line.losses[line.lowest]):
        parts.append(_mark(place(line.shares[line.lowest], line.losses[line.lowest]), "lowest"))
    told = f"loss from {first} to {second}: barrier {line.barrier:.4f} nats a token"
    return (
        f'<svg class="heatmap curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">'
        f"{''.join(parts)}</svg>"
    )


def _axis_y(y: float, name: str) -> str:
    grid = f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    return f'{grid}<text class="block" x="{LEFT - 6}" y="{y + 3:.1f}">{name}</text>'


def _axis_x(x: float, name: str) -> str:
    return f'<text text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 28}">{name}</text>'


def _words(first: str, second: str) -> list[str]:
    y = HEIGHT - 12
    return [
        f'<text x="{LEFT}" y="{y}">{escape(_short(first))}</text>',
        f'<text text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{y}">nats a token over t</text>',
        f'<text text-anchor="end" x="{WIDTH - RIGHT}" y="{y}">{escape(_short(second))}</text>',
    ]


def _mark(place: tuple[float, float], what: str) -> str:
    return f'<circle class="mark" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="4.5"><title>{what}</title></circle>'


def _at(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, TICKS at most; the one number where they are one."""
    if high <= low:
        return [low]
    power = 10.0 ** floor(log10(high - low))
    sizes = [size * power for size in (0.1, 0.2, 0.5, 1.0, 2.0)]
    step = next((size for size in sizes if (high - low) / size < TICKS), high - low)
    first = -floor(-low / step)
    return [step * number for number in range(first, floor(high / step) + 1)] or [low]


def _name(tick: float, ticks: Sequence[float]) -> str:
    """A number with as many decimals as tell it from its neighbours."""
    decimals = next((d for d in range(1, 12) if len({f"{each:.{d}f}" for each in ticks}) == len(ticks)), 12)
    return f"{tick:.{decimals}f}"


def _stacked(drawn: Sequence[str]) -> str:
    """Pictures as one, one above the other."""
    if len(drawn) == 1:
        return drawn[0]
    inner = "".join(
        each.replace("<svg ", f'<svg x="0" y="{number * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        for number, each in enumerate(drawn)
    )
    return f'<svg class="heatmap curve" viewBox="0 0 {WIDTH} {HEIGHT * len(drawn)}" role="img">{inner}</svg>'


def _alone(drawn: str) -> str:
    """A picture as a file of its own, in the light theme's colours."""
    style = re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], PICTURE)
    head = '<svg xmlns="http://www.w3.org/2000/svg" '
    return drawn.replace("<svg ", head, 1).replace(">", f"><style>{style}</style>", 1) + "\n"


def _page(named: Sequence[tuple[str, str, Line]], drawn: Sequence[str], what: str) -> str:
    parts = [
        f"<section><h2>{escape(first)} to {escape(second)}: a barrier of {line.barrier:.4f} nats a token</h2>"
        f"{each}</section>"
        for (first, second, line), each in zip(named, drawn, strict=True)
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>Loss on the straight line</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Loss on the straight line</h1>\n<p class="soft">measured on {escape(what)}</p>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
