"""Manifests as one page of HTML that needs nothing else: no script, no font, no network.

The same manifests give the same page, to the byte. Whatever a manifest lacks is left out of the page.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from wtool.report import asked, comparison, curves, layers, quality, sizes
from wtool.report.figures import Linear, linears, middle
from wtool.report.quality import Score
from wtool.report.style import CSS

GENERATOR = '<meta name="generator" content="wtool report">'  # tells a report from other pages


def report_html(manifest: Mapping[str, Any], *, name: str, scores: Sequence[Score] = ()) -> str:
    """The page of one checkpoint.

    manifest: the content of an output's wtool.json
    name: of the checkpoint, as the page's title
    scores: what `wtool eval` measured, of this checkpoint and of others to compare it with
    """
    return _page(name, [*_parts(manifest, name, quality.table(scores)), _footer(manifest)])


def comparison_html(named: Sequence[tuple[str, Mapping[str, Any]]], *, scores: Sequence[Score] = ()) -> str:
    """The page of several checkpoints: side by side first, then each one's own.

    named: their names and manifests
    """
    title = ", ".join(name for name, _ in named)
    head = [f"<h1>{escape(title)}</h1>", comparison.table(named, scores), quality.table(scores)]
    own = [f"<article>{''.join(_parts(manifest, name, ''))}</article>" for name, manifest in named]
    return _page(title, [*head, *own, _footer(named[0][1])])


def _page(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"{GENERATOR}\n<title>{escape(title)}: wtool report</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _parts(manifest: Mapping[str, Any], name: str, measured: str) -> list[str]:
    found = linears(manifest)
    pictures = layers.pictures(found)
    beside = layers.worst_table(found) + layers.fallbacks(found) + asked.left(manifest)
    return [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(asked.sentence(manifest))}</p>',
        _tiles(manifest, found),
        measured,
        curves.pictures(manifest),
        sizes.kept(manifest),
        _pair(pictures[0] if pictures else "", beside),
        *_pairs(pictures[1:]),
        _pair(asked.table(manifest), asked.again(manifest)),
        layers.all_linears(found, asked.done(manifest)),
    ]


def _footer(manifest: Mapping[str, Any]) -> str:
    version = escape(str(manifest.get("wtool", "")))
    return f"<footer>Made by wtool {version} from the manifest wtool.json.</footer>"


def _pairs(parts: Sequence[str]) -> list[str]:
    return [_pair(*(*parts[i : i + 2], "")[:2]) for i in range(0, len(parts), 2)]


def _pair(first: str, second: str) -> str:
    """Two parts beside each other where the page is wide; one alone if the other is empty."""
    if first and second:
        return f'<div class="pair"><div>{first}</div><div>{second}</div></div>'
    return first or second


def _tiles(manifest: Mapping[str, Any], found: Sequence[Linear]) -> str:
    """The few figures that matter most."""
    tiles = [*sizes.tiles(manifest), *curves.tiles(manifest), *_middles(found, asked.done(manifest))]
    if fallen := sum(bool(each.fallback) for each in found):
        tiles.append((f"{fallen:,}", "not by the method, see below"))
    cells = [f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles]
    return f'<div class="tiles">{"".join(cells)}</div>' if tiles else ""


def _middles(found: Sequence[Linear], done: str) -> list[tuple[str, str]]:
    tiles = [(f"{len(found):,}", f"{'matrices' if done == 'merged' else 'linear layers'} {done}")] if found else []
    of_output, gain = middle([each.output_error for each in found]), middle([each.gain for each in found])
    of_weight = middle([each.weight_error for each in found])
    if of_output is not None:
        tiles.append((f"{of_output:.4f}", "output error of the median layer"))
    elif of_weight is not None:
        tiles.append((f"{of_weight:.4f}", "weight error of the median layer"))
    if gain is not None:
        plain = "rounding" if any(each.rtn_output_error for each in found) else "cutting alone"
        tiles.append((f"{-gain:+.0%}".replace("-", "−"), f"output error against {plain}, median layer"))
    conflict = middle([each.conflict for each in found])
    if conflict is not None:
        tiles.append((f"{conflict:.1%}", "of the weights pulled both ways, median layer"))
    return tiles
