"""Which token has which number: read from tokenizer files, before weights are read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wtool.checkpoint import Checkpoint
from wtool.errors import MalformedFile

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Tokens:
    """A model's tokens: the number of each, and the flags of those that are looked for in a text before it is split."""

    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def names(self) -> dict[int, str]:
        """The token of each number."""
        return {number: token for token, number in self.numbers.items()}

    @cached_property
    def end(self) -> int:
        """The number after the last."""
        return max(self.numbers.values(), default=-1) + 1


def tokens_of(checkpoint: Checkpoint) -> Tokens | None:
    """A model's tokens; None where no file tells them that is read here (a SentencePiece model alone, or nothing).

    raises: MalformedFile
    """
    files = checkpoint.files
    if "tokenizer.json" in files:
        tokens = _from_tokenizer_json(files["tokenizer.json"])
    elif "vocab.json" in files:
        tokens = Tokens(read_json(files["vocab.json"]))
    elif "vocab.txt" in files:
        lines = files["vocab.txt"].read_text(encoding="utf-8").splitlines()
        tokens = Tokens({token: number for number, token in enumerate(lines)})
    else:
        return None
    return _with_added(tokens, _added_beside(files))


def _from_tokenizer_json(path: Path) -> Tokens:
    content = read_json(path)
    model = content.get("model", {}).get("vocab", {})
    # a unigram model lists [token, score]
    numbers = dict(model) if isinstance(model, Mapping) else {entry[0]: n for n, entry in enumerate(model)}
    added = {entry["content"]: entry for entry in content.get("added_tokens", [])}
    flags = {token: {flag: entry.get(flag, False) for flag in FLAGS} for token, entry in added.items()}
    return Tokens({**numbers, **{token: entry["id"] for token, entry in added.items()}}, flags)


def _added_beside(files: Mapping[str, Path]) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """The tokens that added_tokens.json and tokenizer_config.json add: token -> (number, flags)."""
    listed = read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
    config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    found: dict[str, tuple[int, Mapping[str, Any]]] = {token: (number, {}) for token, number in listed.items()}
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        found[entry["content"]] = (int(number), {flag: entry.get(flag, False) for flag in FLAGS})
    return found


def _with_added(tokens: Tokens, beside: Mapping[str, tuple[int, Mapping[str, Any]]]) -> Tokens:
    """Tokens, and those told of elsewhere that have a number of their own."""
    new = {token: pair for token, pair in beside.items() if token not in tokens.numbers and pair[0] not in tokens.names}
    numbers = {**tokens.numbers, **{token: number for token, (number, _) in new.items()}}
    return Tokens(numbers, {**tokens.added, **{token: flags for token, (_, flags) in new.items()}})


def read_json(path: Path) -> dict[str, Any]:
    """A file's content, which must be a JSON object. raises: MalformedFile"""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MalformedFile(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise MalformedFile(f"{path}: holds a {type(content).__name__}; a JSON object is expected")
    return content


def same_sentencepiece(models: Sequence[Checkpoint]) -> bool:
    """Whether models whose tokens are not read here have the very same SentencePiece file, and nothing added."""
    found = set()
    for model in models:
        names = [name for name in (*SENTENCEPIECE, "added_tokens.json") if name in model.files]
        found.add(tuple((name, model.files[name].read_bytes()) for name in names))
    return len(found) == 1 and found != {()}


def difference(donor: Checkpoint, other: Checkpoint, ours: Tokens, theirs: Tokens) -> str | None:
    """Why the same numbers do not mean the same tokens in two models; None where they do, as far as both go."""
    moved = [token for token, number in ours.numbers.items() if theirs.numbers.get(token, number) != number]
    if moved:
        token = moved[0]
        return (
            f"tokenizers differ: {len(moved)} of {len(ours.numbers)} tokens have other numbers in {other.label} than "
            f"in {donor.label} (first: {token!r} is {theirs.numbers[token]}, not {ours.numbers[token]})"
        )
    for number, token in ours.names.items():
        if theirs.names.get(number, token) != token:
            return (
                f"tokenizers differ: number {number} is {token!r} in {donor.label} and "
                f"{theirs.names[number]!r} in {other.label}"
            )
    return None
