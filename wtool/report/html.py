"""A manifest as one page of HTML that needs nothing else: no script, no font, no network.

The same manifest gives the same page, to the byte. Whatever a manifest lacks is left out of the page.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from wtool.console import human_bytes
from wtool.report import asked, curves, errors
from wtool.report.figures import Linear, linears, middle
from wtool.report.style import CSS

GENERATOR = '<meta name="generator" content="wtool report">'  # tells a report from other pages


def report_html(manifest: Mapping[str, Any], *, name: str) -> str:
    """The page.

    manifest: the content of an output's wtool.json
    name: of the checkpoint, as the page's title
    """
    found = linears(manifest)
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(asked.sentence(manifest))}</p>',
        _tiles(manifest, found),
        curves.pictures(manifest),
        _pair(errors.pictures(found), errors.worst_table(found) + errors.fallbacks(found) + asked.left(manifest)),
        _pair(asked.table(manifest), asked.again(manifest)),
        errors.all_linears(found),
        f"<footer>Made by wtool {escape(str(manifest.get('wtool', '')))} from the manifest wtool.json.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"{GENERATOR}\n<title>{escape(name)}: wtool report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _pair(first: str, second: str) -> str:
    """Two parts beside each other where the page is wide; one alone if the other is empty."""
    if first and second:
        return f'<div class="pair"><div>{first}</div><div>{second}</div></div>'
    return first or second


def _tiles(manifest: Mapping[str, Any], found: Sequence[Linear]) -> str:
    """The few figures that matter most."""
    tiles = [*_sizes(manifest.get("summary")), *curves.tiles(manifest), *_middles(found, asked.done(manifest))]
    if fallen := sum(bool(each.fallback) for each in found):
        tiles.append((f"{fallen:,}", "not by the method, see below"))
    cells = [f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles]
    return f'<div class="tiles">{"".join(cells)}</div>' if tiles else ""


def _sizes(summary: Any) -> list[tuple[str, str]]:
    if not isinstance(summary, Mapping):
        return []
    tiles: list[tuple[str, str]] = []
    before, after, bits = (summary.get(key) for key in ("bytes_before", "bytes_after", "bits_per_weight"))
    if before and after:
        tiles.append((human_bytes(after), f"of weights, {after / before:.0%} of the {human_bytes(before)} before"))
    sparsity = summary.get("sparsity")
    if isinstance(sparsity, (int, float)):
        tiles.append((f"{sparsity:.1%}", "of the pruned layers' weights are 0"))
    if isinstance(bits, (int, float)):
        tiles.append((f"{bits:.2f} bits", "a quantized weight, scales included"))
    return tiles


def _middles(found: Sequence[Linear], done: str) -> list[tuple[str, str]]:
    tiles = [(f"{len(found):,}", f"linear layers {done}")] if found else []
    of_output, gain = middle([each.output_error for each in found]), middle([each.gain for each in found])
    of_weight = middle([each.weight_error for each in found])
    if of_output is not None:
        tiles.append((f"{of_output:.4f}", "output error of the median layer"))
    elif of_weight is not None:
        tiles.append((f"{of_weight:.4f}", "weight error of the median layer"))
    if gain is not None:
        tiles.append((f"{-gain:+.0%}".replace("-", "−"), "output error against rounding, median layer"))
    return tiles
