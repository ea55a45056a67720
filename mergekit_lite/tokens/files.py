"""Tokenizer files of a vocabulary that has grown: the base's, with the tokens that other models add.

They are edited as the JSON they are. The base's tokens keep their numbers and the new ones follow, in the models'
order. What a model looks for in a text before it is split (an added token: <|im_start|>, a tool's marker) stays such a
token, with its flags. An ordinary piece of another BPE gets a number, so that it is decoded as in its own model, but
no merge makes it: texts are split as the base splits them. mergekit makes such pieces added tokens, which then cut
words of every text in two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wtool.checkpoint import Checkpoint
from wtool.checkpoint.folder import TOKENIZER_FILES
from wtool.shards import json_bytes

from .tokenizer import FLAGS, SENTENCEPIECE, Tokens, read_json

TAKES_PIECES = ("BPE", "WordLevel")  # models in which a further piece leaves the splitting of texts as it is
TOKENIZER = "tokenizer.json"
SPLITTING = ("normalizer", "pre_tokenizer")


@dataclass(frozen=True)
class Union:
    """The tokens of several models, with the base's numbers."""

    tokens: Tokens
    pieces: Mapping[str, int]  # those of the new ones that are ordinary
    problems: Sequence[str]
    warnings: Sequence[str]


def own_files(model: Checkpoint) -> dict[str, bytes | Path]:
    """A model's tokenizer files, as they are."""
    return {name: model.files[name] for name in TOKENIZER_FILES if name in model.files}


def union(models: Sequence[Checkpoint], tokens: Sequence[Tokens]) -> Union:
    """Number the tokens of all models; the first is the base."""
    content = read_json(models[0].files[TOKENIZER])
    numbers, added, pieces = dict(tokens[0].numbers), dict(tokens[0].added), {}
    end = max(tokens[0].end, len(content["model"]["vocab"]))
    problems, warnings = [], []
    for model, own in zip(models[1:], tokens[1:], strict=True):
        new = [token for token in sorted(own.numbers, key=lambda t: own.numbers[t]) if token not in numbers]
        fresh = {token: end + i for i, token in enumerate(new)}
        end += len(new)
        numbers |= fresh
        added |= {token: own.added[token] for token in new if token in own.added}
        ordinary = {token: number for token, number in fresh.items() if token not in own.added}
        pieces |= ordinary
        if ordinary:
            problem, warning = _about_pieces(content, models[0], model, list(ordinary))
            problems += [problem] if problem else []
            warnings += [warning] if warning else []
        if new and (told := _splits_otherwise(content, read_json(model.files[TOKENIZER]), models[0], model)):
            warnings.append(told)
    return Union(Tokens(numbers, added), pieces, problems, warnings)


def _about_pieces(
    content: Mapping[str, Any], base: Checkpoint, model: Checkpoint, pieces: Sequence[str]
) -> tuple[str | None, str | None]:
    """What stands against ordinary pieces of another model, and what is worth a remark."""
    kind = content["model"].get("type")
    told = f"{len(pieces)} ordinary tokens of {model.label} are not in {base.label} (first: {pieces[0]!r})"
    if kind not in TAKES_PIECES:
        return (
            f"tokenizer: {told}, and a {kind} tokenizer with them splits texts as none of the models does; "
            "take source: base, or one of the models"
        ), None
    if content["model"].get("ignore_merges"):
        return None, f"{told}; a word that is one of them is taken whole, other texts are split as by {base.label}"
    return None, f"{told}; they have rows, but texts are split as by {base.label}, which never makes them"


def _splits_otherwise(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], base: Checkpoint, model: Checkpoint
) -> str | None:
    unlike = [part for part in SPLITTING if ours.get(part) != theirs.get(part)]
    if ours["model"].get("type") != theirs.get("model", {}).get("type"):
        unlike.append("model")
    if not unlike:
        return None
    return f"{model.label} splits texts in another way ({', '.join(unlike)}); the output splits them as {base.label}"


def grown_files(base: Checkpoint, own: Tokens, made: Union) -> dict[str, bytes | Path]:
    """The base's tokenizer files, with the new tokens of a union.

    own: the base's tokens
    """
    files = own_files(base)
    new = {token: number for token, number in made.tokens.numbers.items() if token not in own.numbers}
    if not new:
        return files
    extra = {token: number for token, number in new.items() if token not in made.pieces}
    content = read_json(base.files[TOKENIZER])
    files[TOKENIZER] = json_bytes(_grown_tokenizer(content, extra, made))
    if "tokenizer_config.json" in files:
        config = read_json(base.files["tokenizer_config.json"])
        files["tokenizer_config.json"] = json_bytes(_grown_config(config, extra, made.tokens))
    if "added_tokens.json" in files or any(name in files for name in ("vocab.json", *SENTENCEPIECE)):
        listed = read_json(base.files["added_tokens.json"]) if "added_tokens.json" in files else {}
        files["added_tokens.json"] = json_bytes({**listed, **extra})
    if made.pieces and "vocab.json" in files:
        files["vocab.json"] = json_bytes({**read_json(base.files["vocab.json"]), **made.pieces})
    return files


def _grown_tokenizer(content: dict[str, Any], extra: Mapping[str, int], made: Union) -> dict[str, Any]:
    """tokenizer.json with the new tokens."""
    entries = [
        *content.get("added_tokens", []),
        *({"id": number, "content": token, **_flags(made.tokens, token)} for token, number in extra.items()),
    ]
    if not made.pieces:
        return {**content, "added_tokens": entries}
    # An added token that the model's own vocabulary lacks is numbered when it is read, after that vocabulary: it must
    # be in there too, once the vocabulary has pieces that stand behind it.
    vocabulary = {**content["model"]["vocab"], **{entry["content"]: entry["id"] for entry in entries}, **made.pieces}
    ordered = dict(sorted(vocabulary.items(), key=lambda pair: pair[1]))
    return {**content, "added_tokens": entries, "model": {**content["model"], "vocab": ordered}}


def _grown_config(config: dict[str, Any], extra: Mapping[str, int], tokens: Tokens) -> dict[str, Any]:
    """tokenizer_config.json, where it lists the added tokens."""
    if "added_tokens_decoder" not in config:
        return config
    new = {str(number): {"content": token, **_flags(tokens, token)} for token, number in extra.items()}
    return {**config, "added_tokens_decoder": {**config["added_tokens_decoder"], **new}}


def _flags(tokens: Tokens, token: str) -> dict[str, Any]:
    return {flag: tokens.added.get(token, {}).get(flag, False) for flag in FLAGS}
