"""The parts of the page that tell what was asked, of what, and how to have it again."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import yaml

NAMED = 30  # tensors of one reason told by name
DONE = {"quantize": "quantized", "merge": "merged", "prune": "pruned", "distill": "distilled"}
CALIBRATION = ("samples", "length", "tokens", "seed", "sources", "ids_xxh3")  # what is told of the text


def sentence(manifest: Mapping[str, Any]) -> str:
    """What was done to what, in a line."""
    verb, record = request(manifest)
    method, bits, width = (record.get(key) for key in ("method", "bits", "group_size"))
    names = [str(each.get("checkpoint")) for each in _inputs(manifest)]
    by = f" by {method or record.get('merge_method')}" if method or record.get("merge_method") else ""
    if bits is None or verb == "prune":
        return f"{', '.join(names) or 'unnamed inputs'}, {DONE.get(verb, 'made')}{by}"
    groups = "" if width is None else ", a scale a row" if width == -1 else f", groups of {width}"
    return f"{', '.join(names[:1]) or 'an unnamed input'}, quantized{by} to {bits} bits{groups}"


def done(manifest: Mapping[str, Any]) -> str:
    """What was done, in a word."""
    return DONE.get(request(manifest)[0], "made")


def request(manifest: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The verb, and what it was asked; empty where the manifest does not tell."""
    recipe = manifest.get("recipe")
    if not isinstance(recipe, Mapping):
        return "", {}
    for verb in DONE:
        if isinstance(recipe.get(verb), Mapping):
            return verb, recipe[verb]
    return "", recipe


def table(manifest: Mapping[str, Any]) -> str:
    """The recipe, the calibration text and the inputs."""
    _, record = request(manifest)
    rows = [(str(key), _plain(value)) for key, value in record.items()]
    recipe = manifest.get("recipe")
    beside = recipe.get("calibration") if isinstance(recipe, Mapping) and recipe is not record else None
    calibration = beside or manifest.get("calibration")
    if isinstance(calibration, Mapping):
        rows += [(f"text: {key}", _plain(calibration[key])) for key in CALIBRATION if key in calibration]
    rows += [(f"input {number}", _told(each)) for number, each in enumerate(_inputs(manifest), 1)]
    cells = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
    return f'<section><h2>What was done</h2><table class="text">{cells}</table></section>' if rows else ""


def again(manifest: Mapping[str, Any]) -> str:
    """The recipe as a file, and the command that takes it."""
    verb, record = request(manifest)
    if not verb:
        return ""
    recipe = yaml.safe_dump(_data(record), sort_keys=False, allow_unicode=True)
    return (
        "<section><h2>To make it again</h2><p>Save this as <code>recipe.yml</code>,</p>"
        f"<pre>{escape(recipe)}</pre><p>and run</p><pre>wtool {verb} recipe.yml -o OUT</pre></section>"
    )


def left(manifest: Mapping[str, Any]) -> str:
    """The tensors that were not quantized, by reason."""
    by_reason: dict[str, list[str]] = {}
    told = manifest.get("left")
    for tensor, reason in told.items() if isinstance(told, Mapping) else ():
        by_reason.setdefault(str(reason), []).append(str(tensor))
    parts = "".join(_reason(reason, names) for reason, names in by_reason.items())
    return f"<section><h2>Left as it was</h2>{parts}</section>" if parts else ""


def _reason(reason: str, names: list[str]) -> str:
    items = "".join(f"<li><code>{escape(each)}</code></li>" for each in names[:NAMED])
    more = f"<li>and {len(names) - NAMED:,} more</li>" if len(names) > NAMED else ""
    count = "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
    return f"<details><summary>{count}: {escape(reason)}</summary><ul>{items}{more}</ul></details>"


def _inputs(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = manifest.get("inputs")
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _told(entry: Mapping[str, Any]) -> str:
    revision = f" at {entry['revision']}" if entry.get("revision") else ""
    digest = f", weights xxh3 {entry['weights_xxh3']}" if entry.get("weights_xxh3") else ""
    return f"{entry.get('checkpoint')}{revision}{digest}"


def _plain(value: Any) -> str:
    """A value of a recipe, in a line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items()) or "none"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "; ".join(map(_plain, value)) or "none"
    return str(value)


def _data(value: Any) -> Any:
    """Plain dicts and lists, as YAML wants them."""
    if isinstance(value, Mapping):
        return {str(key): _data(each) for key, each in value.items()}
    return [_data(each) for each in value] if isinstance(value, (list, tuple)) else value
