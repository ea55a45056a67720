"""Do two models mean the same tokens by the same numbers? Told from tokenizer files, before weights are read."""

import json
from collections.abc import Mapping
from pathlib import Path

from wtool.checkpoint import Checkpoint


def vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Token -> number, from tokenizer.json or vocab.json; None where there is neither."""
    files = checkpoint.files
    if "tokenizer.json" in files:
        return _from_tokenizer_json(files["tokenizer.json"])
    if "vocab.json" in files:
        return {
            **_read(files["vocab.json"]),
            **(_read(files["added_tokens.json"]) if "added_tokens.json" in files else {}),
        }
    return None


def _from_tokenizer_json(path: Path) -> dict[str, int]:
    content = _read(path)
    entries = content.get("model", {}).get("vocab", {})
    if isinstance(entries, Mapping):
        tokens = dict(entries)
    else:  # a unigram model lists [token, score]
        tokens = {entry[0]: number for number, entry in enumerate(entries)}
    return {**tokens, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def compare(donor: Checkpoint, other: Checkpoint) -> tuple[str | None, str | None]:
    """Compare vocabularies: (what makes a merge senseless, what is worth a warning)."""
    ours, theirs = vocabulary(donor), vocabulary(other)
    if ours is None or theirs is None or ours == theirs:
        return None, None
    moved = [token for token, number in ours.items() if theirs.get(token, number) != number]
    if moved:
        token = moved[0]
        return (
            f"tokenizers differ: {len(moved)} of {len(ours)} tokens have other numbers in {other.label} than in "
            f"{donor.label} (first: {token!r} is {theirs[token]}, not {ours[token]})"
        ), None
    only = sorted(set(ours) ^ set(theirs))
    return None, (
        f"tokenizers differ: {len(only)} tokens are only in one of {donor.label} and {other.label} "
        f"(first: {only[0]!r}); the output has the tokenizer of {donor.label}"
    )
