"""The part of the page that tells how a training went: lines over the tokens learnt from."""

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite, log10
from typing import Any

WIDTH, HEIGHT = 520, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 30
Point = tuple[float, float]

# what is drawn: the list in the manifest, the key, the title, what it is
LINES = (
    ("evaluation", "kl", "Held-out text: KL from the teacher", "nats per token"),
    ("evaluation", "perplexity", "Held-out text: perplexity", ""),
    ("training", "loss", "Training loss", "per token"),
    ("training", "learning_rate", "Learning rate", ""),
)


def pictures(manifest: Mapping[str, Any]) -> str:
    """A picture for every line that the manifest tells of; nothing where there was no training."""
    drawn = "".join(f"<div><h3>{escape(title)}</h3>{picture}</div>" for title, picture in drawings(manifest))
    return f'<section><h2>The training</h2><div class="curves">{drawn}</div></section>' if drawn else ""


def drawings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The titles and pictures of the lines that the manifest tells of."""
    drawn = []
    for part, key, title, unit in LINES:
        points = _points(manifest.get(part), key)
        if len(points) > 1:
            best = manifest.get("best_step") if part == "evaluation" else None
            kept = (_point(each, key) for each in _entries(manifest.get(part)) if each.get("step") == best)
            drawn.append((title, _picture(points, next(kept, None), title, unit)))
    return drawn


def tiles(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter most."""
    told = _entries(manifest.get("evaluation"))
    found: list[tuple[str, str]] = []
    for key, what in (("kl", "nats per token from the teacher, held-out text"), ("perplexity", "on held-out text")):
        values = [each[key] for each in told if _number(each.get(key))]
        if len(values) > 1:
            best = next((each for each in told if each.get("step") == manifest.get("best_step")), told[-1])
            last = best[key] if _number(best.get(key)) else values[-1]
            found.append((f"{values[0]:.3g} → {last:.3g}", what if key == "kl" else f"perplexity {what}"))
    tokens = [each["tokens"] for each in told if _number(each.get("tokens"))]
    return [*found, (f"{tokens[-1]:,.0f}", "tokens learnt from")] if found and tokens else found


def _entries(part: Any) -> list[Mapping[str, Any]]:
    return [each for each in part if isinstance(each, Mapping)] if isinstance(part, Sequence) else []


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _point(entry: Mapping[str, Any], key: str) -> Point | None:
    x, y = entry.get("tokens"), entry.get(key)
    return (float(x), float(y)) if _number(x) and _number(y) else None  # pyright: ignore[reportArgumentType]


def _points(part: Any, key: str) -> list[Point]:
    return [point for each in _entries(part) if (point := _point(each, key)) is not None]


def _picture(points: Sequence[Point], marked: Point | None, title: str, unit: str) -> str:
    """A line with its axes."""
    right = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    span = (high - low) or 1.0

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + point[0] / right * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - point[1]) / span * (HEIGHT - TOP - BOTTOM)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
    parts = [f'<polyline class="line" points="{path}"/>']
    names = _names(ticks)
    for tick, name in zip(ticks, names, strict=True):
        _, y = place((0.0, tick))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="block" x="{LEFT - 6}" y="{y + 3:.1f}">{name}</text>')
    for tick in _ticks(0.0, right):
        x, _ = place((tick, low))
        parts.append(f'<text text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 12}">{_short(tick)}</text>')
    parts.append(f'<text text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 1}">tokens</text>')
    if marked is not None:
        x, y = place(marked)
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>kept</title></circle>')
    told = f"{title}: {_short(points[0][1])} at first, {_short(points[-1][1])} at last{' ' + unit if unit else ''}"
    return (
        f'<svg class="heatmap curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">'
        f"{''.join(parts)}</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two, or the one number they are."""
    if high <= low:
        return [low]
    power = 10.0 ** int(log10(high - low) - 1 if high - low < 1 else log10(high - low))
    step = next(size * power for size in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if (high - low) / (size * power) <= 5)
    first = -(-low // step)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)] or [low]


def _names(ticks: Sequence[float]) -> list[str]:
    """Numbers in as few signs as tell them apart."""
    tried = ([_short(tick, digits) for tick in ticks] for digits in range(3, 17))
    return next((names for names in tried if len(set(names)) == len(ticks)), [repr(tick) for tick in ticks])


def _short(value: float, digits: int = 3) -> str:
    """A number in a few signs."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"
