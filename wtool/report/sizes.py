"""The parts of the page on sizes: bytes, parameters, and what a pruning kept of every dimension."""

from collections.abc import Mapping
from html import escape
from typing import Any

from wtool.console import human_bytes

NAMES = {"ffn": "feed-forward channels", "heads": "heads", "kv_heads": "key-value heads", "hidden": "hidden channels"}


def tiles(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sizes that matter most."""
    summary = _mapping(manifest.get("summary"))
    before, after, bits = (_number(summary.get(key)) for key in ("bytes_before", "bytes_after", "bits_per_weight"))
    found: list[tuple[str, str]] = []
    if before and after:
        found.append(
            (human_bytes(int(after)), f"of weights, {share(after, before)} of the {human_bytes(int(before))} before")
        )
    params_before, params_after = (_number(summary.get(key)) for key in ("params_before", "params_after"))
    if params_before and params_after:
        told = f"parameters, {share(params_after, params_before)} of the {_count(params_before)} before"
        found.append((_count(params_after), told))
    sparsity = _number(summary.get("sparsity"))
    if sparsity is not None:
        found.append((f"{sparsity:.1%}", "of the pruned layers' weights are 0"))
    if bits is not None:
        found.append((f"{bits:.2f} bits", "a quantized weight, scales included"))
    return found


def kept(manifest: Mapping[str, Any]) -> str:
    """What a pruning kept: each dimension before and after, and which layers."""
    sizes = _mapping(_mapping(manifest.get("summary")).get("sizes"))
    rows = "".join(_row(str(key), value) for key, value in sizes.items())
    strip = _layers(manifest)
    if not rows and not strip:
        return ""
    head = "".join(f'<th scope="col">{column}</th>' for column in ("what", "before", "after", "kept"))
    told = f"<table><tr>{head}</tr>{rows}</table>" if rows else ""
    return f"<section><h2>What was kept</h2>{told}{strip}</section>"


def share(after: float, before: float) -> str:
    """In percent, so that a little less than all is not told as all."""
    return f"{after / before:.0%}" if after / before < 0.995 or after >= before else f"{after / before:.2%}"


def _row(key: str, value: Any) -> str:
    if not (isinstance(value, list) and len(value) == 2 and all(_number(each) is not None for each in value)):
        return ""
    before, after = value
    cells = f"<td>{before:,}</td><td>{after:,}</td><td>{share(after, before) if before else '–'}</td>"
    return f"<tr><td>{escape(NAMES.get(key, key.replace('_', ' ')))}</td>{cells}</tr>"


def _layers(manifest: Mapping[str, Any]) -> str:
    """A square for each layer of the whole model, filled where it was kept; nothing where all were."""
    sizes = _mapping(_mapping(manifest.get("summary")).get("sizes"))
    told = _mapping(manifest.get("kept")) or _mapping(_mapping(manifest.get("recipe")).get("kept"))
    total, stay = sizes.get("layers"), told.get("layers")
    if not (isinstance(total, list) and total and isinstance(total[0], int) and isinstance(stay, list)):
        return ""
    gone = [number for number in range(total[0]) if number not in stay]
    if not gone:
        return ""
    squares = "".join(f'<i class="{"gone" if number in gone else "stays"}">{number}</i>' for number in range(total[0]))
    told = f"Layers {', '.join(map(str, gone))} went; the others were numbered anew."
    return f'<h3>Layers</h3><div class="layers" aria-hidden="true">{squares}</div><p class="soft small">{told}</p>'


def _count(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
