"""The model card of an output on its way to the Hub: what it was made of, by which method, and what was measured.

An output has a card of its own already; here what only its user can know is added, the figures of `wtool eval` and
the models on the Hub that stand behind inputs from this machine.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from wtool import __version__
from wtool.checkpoint.folder import read_json
from wtool.checkpoint.made import MANIFEST
from wtool.checkpoint.resolve import is_hub_id
from wtool.errors import MalformedFile, MissingInput

FRONT = re.compile(r"\A---\n(.*?)\n?---\n", re.DOTALL)
MEASURED = re.compile(r"\n*<!-- wtool: measured -->.*?<!-- wtool: end -->\n*", re.DOTALL)
DEPTH = 8  # of inputs' inputs


def completed(card: str | None, manifest: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], name: str) -> str:
    """A card with all that belongs into it.

    card:     the one there is; None makes one of the manifest
    manifest: wtool.json's content; empty for a checkpoint that wtool did not make
    measured: what `wtool eval --json` printed
    name:     the heading of a card that is made
    raises:   MalformedFile where the card's front matter is not YAML
    """
    head, body = _divided(_of_manifest(manifest, name) if card is None else card)
    if manifest:
        head.setdefault("library_name", "transformers")
        tags = head.get("tags") or []
        head["tags"] = tags if "wtool" in tags else [*([tags] if isinstance(tags, str) else tags), "wtool"]
        found = bases(manifest)
        if found and not head.get("base_model"):
            head["base_model"] = found
    front = f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n" if head else ""
    if measured:
        body = f"{MEASURED.sub('', body).rstrip()}\n\n{_figures(measured)}"
    return front + body


def bases(manifest: Mapping[str, Any], depth: int = DEPTH) -> list[str]:
    """The Hub's models behind a checkpoint: its inputs, and those of inputs that wtool made on this machine."""
    found: list[str] = []
    for entry in manifest.get("inputs", ()):
        stored = str(entry.get("checkpoint", "")).split("+")[0]
        if entry.get("revision") and is_hub_id(stored):
            found.append(stored.partition("@")[0])
        elif depth and (Path(stored) / MANIFEST).is_file():
            found += bases(read_json(Path(stored) / MANIFEST), depth - 1)
    return list(dict.fromkeys(found))


def read_figures(path: Path) -> dict[str, Any]:
    """What `wtool eval --json` printed into a file.

    raises: MissingInput, MalformedFile
    """
    if not path.is_file():
        raise MissingInput(f"{path}: no such file; make it with wtool eval … --json > {path}")
    content = read_json(path)
    texts = content.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, dict) and "perplexity" in text for text in texts):
        raise MalformedFile(f"{path}: not what wtool eval --json prints: it needs 'texts', each with a perplexity")
    return content


def _divided(card: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and what follows it."""
    found = FRONT.match(card)
    if found is None:
        return {}, card
    try:
        head = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise MalformedFile(f"README.md: its front matter is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(head, dict):
        raise MalformedFile("README.md: its front matter is no mapping of keys and values")
    return head, card[found.end() :]


def _of_manifest(manifest: Mapping[str, Any], name: str) -> str:
    """A card for an output that has none."""
    if not manifest:
        return f"\n# {name}\n"
    recipe = manifest.get("recipe", {})
    verb = next(iter(recipe)) if len(recipe) == 1 else None
    asked = recipe[verb] if verb else recipe
    inputs = "\n".join(f"- `{entry['checkpoint']}`" for entry in manifest.get("inputs", ()))
    how = f"Save it as `recipe.yml` and run `wtool {verb} recipe.yml -o OUT`.\n\n" if verb else ""
    return (
        f"\n# {name}\n\nMade with wtool {manifest.get('wtool', __version__)} of\n\n{inputs}\n\n## Recipe\n\n{how}"
        f"```yaml\n{yaml.safe_dump(asked, sort_keys=False, allow_unicode=True)}```\n"
    )


def _figures(measured: Sequence[Mapping[str, Any]]) -> str:
    """The measurements as a table; texts and references by the last part of their paths."""
    compared = any(entry.get("reference") for entry in measured)
    columns = ["text", "perplexity", "tokens", "window", "stride"]
    columns += ["reference", "its perplexity", "KL (nats)", "top-1 agreement"] if compared else []
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for entry in measured:
        for text in entry["texts"]:
            lines.append(f"| {' | '.join(_cells(text, entry.get('reference'), compared))} |")
    table = "\n".join(lines)
    return f"<!-- wtool: measured -->\n## Measured\n\n{table}\n\nBy `wtool eval`.\n<!-- wtool: end -->\n"


def _cells(text: Mapping[str, Any], reference: str | None, compared: bool) -> list[str]:
    cells = [PurePath(text.get("file") or "-").name, _number(text["perplexity"], ".4f")]
    cells += [_number(text.get(key), ",") for key in ("tokens", "window", "stride")]
    if compared:
        cells += [_name(reference), _number(text.get("reference_perplexity"), ".4f")]
        cells += [_number(text.get("divergence"), ".3g"), _number(text.get("agreement"), ".2%")]
    return cells


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _name(reference: str | None) -> str:
    """A model by its name on the Hub, or by the last part of its path here."""
    if not reference:
        return "-"
    return reference if is_hub_id(reference) and not Path(reference).exists() else PurePath(reference).name


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest; empty where there is none. raises: MalformedFile"""
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
