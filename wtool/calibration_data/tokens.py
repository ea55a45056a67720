"""Documents as token ids, by the model's own tokenizer and chat template."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from wtool.calibration_data.rows import Chat, Text
from wtool.errors import InputError
from wtool.evaluate import encode
from wtool.writer import checksum


def of_text(tokenizer: PreTrainedTokenizerBase, document: Text) -> list[int]:
    """A text's tokens: a BOS in front where the tokenizer puts one, an EOS behind where it knows one."""
    ids, _ = encode(tokenizer, document.text)
    end = tokenizer.eos_token_id
    return [*ids, end] if isinstance(end, int) else ids


def of_chat(tokenizer: PreTrainedTokenizerBase, document: Chat) -> list[int]:
    """A conversation's tokens, special ones as the chat template sets them.

    raises: InputError where the template does not take the conversation
    """
    try:
        text = tokenizer.apply_chat_template(
            document.messages,
            tools=document.tools,  # pyright: ignore[reportArgumentType] - as they stand in the row
            tokenize=False,
        )
    except Exception as error:
        raise InputError(f"{document.where}: the tokenizer's chat template refuses it: {_line(error)}") from error
    return tokenizer.encode(str(text), add_special_tokens=False, verbose=False)


def identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tells a tokenizer from another, for the manifest."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(vocabulary),
        "vocabulary_xxh3": checksum(json.dumps(vocabulary).encode()),
    }


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
