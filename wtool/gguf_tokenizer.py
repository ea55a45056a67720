"""A tokenizer as GGUF's metadata: vocabulary, merges or scores, special tokens, chat template.

llama.cpp has two kinds that the families here use, both byte pair encoding:

    gpt2    bytes written as letters, text cut into words first by a rule that llama.cpp has under a name
    llama   SentencePiece's: spaces as a low line (U+2581), the piece with the highest score merged first

tokenizer.json tells which one it is and by which rule words are cut; the rule is looked up in `WORDS` by what it is,
not by the model's name, so any vocabulary with a known rule is taken, and another rule is refused.
Source: llama.cpp's llama-vocab.cpp and the tokenizer.json of the models.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from wtool.checkpoint import Checkpoint
from wtool.errors import Mismatch
from wtool.loading import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's kinds of tokens
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MIXED_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+@"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*@"
)
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut into words -> llama.cpp's name of it. "bytes" is the cut of GPT-2, which ByteLevel makes itself.
WORDS: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,): "qwen2",
    (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,): "llama-bpe",
    (_MIXED_CASE.replace("@", "") + r"|\p{N}" + _SLASH,): "tekken",
    (_MIXED_CASE.replace("@", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _SLASH,): "gpt-4o",
}


def tokenizer_metadata(checkpoint: Checkpoint, rows: int) -> dict[str, Any]:
    """The metadata of a checkpoint's tokenizer.

    rows:   of the embedding; the vocabulary is filled up, or cut, to as many
    raises: MissingInput where there is none, Mismatch for one that llama.cpp does not have
    """
    tokenizer: Any = load_tokenizer(checkpoint)
    if not getattr(tokenizer, "is_fast", False):
        raise Mismatch(f"{checkpoint.label}: its tokenizer has no tokenizer.json, which a GGUF is made from")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise Mismatch(f"{checkpoint.label}: no GGUF is made of a {spec['model']['type']} tokenizer here, only of BPE")
    told = _pieces(spec, rows) if _is_pieces(spec) else _byte_level(spec, rows, checkpoint.label)
    told |= _special(tokenizer, rows)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        told["chat_template"] = template
    return {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in told.items()}


def _is_pieces(spec: Mapping[str, Any]) -> bool:
    return bool(spec["model"].get("byte_fallback")) and SPACE in json.dumps(
        [spec["normalizer"], spec["pre_tokenizer"]], ensure_ascii=False
    )


def _byte_level(spec: Mapping[str, Any], rows: int, where: str) -> dict[str, Any]:
    cut = tuple(_cuts(spec["pre_tokenizer"], where))
    if cut not in WORDS:
        raise Mismatch(
            f"{where}: llama.cpp has no name that is known here for how its tokenizer cuts words: "
            f"{' then '.join(cut) or 'not at all'} (known: {', '.join(WORDS.values())})"
        )
    tokens, kinds = _vocabulary(spec, rows)
    merges = [" ".join(pair) for pair in _merges(spec)]
    return {"model": "gpt2", "pre": WORDS[cut], "tokens": tokens, "token_type": kinds, "merges": merges}


def _cuts(step: Mapping[str, Any] | None, where: str) -> list[str]:
    """The steps of cutting text into words, as `WORDS` has them."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [cut for inner in step["pretokenizers"] for cut in _cuts(inner, where)]
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return ["bytes"] if step["use_regex"] else []
    if step["type"] == "Digits" and step["individual_digits"]:
        return ["digits"]
    if step["type"] == "Split" and step["behavior"] in ("Isolated", "Removed") and "Regex" in step["pattern"]:
        return [step["pattern"]["Regex"]]
    return [step["type"]]


def _pieces(spec: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """SentencePiece merges the pair that makes the piece of the highest score; here the first merge, the highest."""
    tokens, kinds = _vocabulary(spec, rows)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(spec)):
        ranks.setdefault(left + right, rank)
    unknown = spec["model"].get("unk_token")
    for i, token in enumerate(tokens):
        if token == unknown:
            kinds[i] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    prefix = _has_prefix(spec)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "add_space_prefix": prefix,
    }


def _has_prefix(spec: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    text = json.dumps(spec["normalizer"])
    pre = spec["pre_tokenizer"] or {}
    return '"Prepend"' in text or (pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never")


def _merges(spec: Mapping[str, Any]) -> list[Sequence[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"]["merges"]]


def _vocabulary(spec: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The tokens by number, and the kind of each."""
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, number in spec["model"]["vocab"].items():
        if number < rows:
            tokens[number], kinds[number] = token, NORMAL
    for added in spec["added_tokens"]:
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _special(tokenizer: Any, rows: int) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: getattr(tokenizer, f"{key}_token_id") for key, name in names.items()}
    told: dict[str, Any] = {f"{name}_token_id": at for name, at in found.items() if at is not None and at < rows}
    alone = tokenizer("")["input_ids"]
    told["add_bos_token"] = bool(alone) and alone[0] == found["bos"]
    told["add_eos_token"] = bool(alone) and alone[-1] == found["eos"] and (len(alone) > 1 or not told["add_bos_token"])
    return told
