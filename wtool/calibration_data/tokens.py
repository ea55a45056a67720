"""Documents as token ids, by the model's own tokenizer and chat template."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from wtool.calibration_data.rows import Chat, Text
from wtool.errors import InputError, Mismatch
from wtool.evaluate import encode
from wtool.writer import checksum

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def of_text(tokenizer: PreTrainedTokenizerBase, document: Text) -> list[int]:
    """A text's tokens: a BOS in front where the tokenizer puts one, an EOS behind where it knows one."""
    ids, _ = encode(tokenizer, document.text)
    end = tokenizer.eos_token_id
    return [*ids, end] if isinstance(end, int) else ids


def of_chat(tokenizer: PreTrainedTokenizerBase, document: Chat) -> list[int]:
    """A conversation's tokens, special ones as the chat template sets them.

    raises: InputError where the template does not take the conversation
    """
    return tokenizer.encode(_rendered(tokenizer, document), add_special_tokens=False, verbose=False)


def spoken(tokenizer: PreTrainedTokenizerBase, document: Chat) -> list[tuple[int, bool]]:
    """A conversation's tokens, and whether the assistant says them: its words and the token that ends its turn.

    Where the template marks them ({% generation %}), those; else what the template adds for each of the assistant's
    messages to the conversation before it with the assistant's prompt behind.

    raises: InputError where the template does not take the conversation, or renders its beginning otherwise once it
            goes on; Mismatch for a tokenizer that does not tell where its tokens lie
    """
    if not tokenizer.is_fast:
        raise Mismatch(f"a {type(tokenizer).__name__} does not tell where in a text its tokens lie")
    text = _rendered(tokenizer, document)
    cut = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if MARKED.search(str(tokenizer.chat_template)):
        marked: Any = tokenizer.apply_chat_template(
            document.messages,
            tools=document.tools,  # pyright: ignore[reportArgumentType]
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return [(token, bool(said)) for token, said in zip(cut["input_ids"], marked["assistant_masks"], strict=True)]
    turns = _turns(tokenizer, document, text)
    places = zip(cut["input_ids"], cut["offset_mapping"], strict=True)
    return [(token, any(begin <= at[0] < end for begin, end in turns)) for token, at in places]


def _turns(tokenizer: PreTrainedTokenizerBase, document: Chat, text: str) -> list[tuple[int, int]]:
    """Where in a rendered conversation the assistant speaks, first and last character."""
    found: list[tuple[int, int]] = []
    for place, message in enumerate(document.messages):
        if message.get("role") != "assistant":
            continue
        before = _rendered(tokenizer, document, document.messages[:place], prompt=True)
        after = _rendered(tokenizer, document, document.messages[: place + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise InputError(
                f"{document.where}: the chat template renders message {place + 1} otherwise than when it is the last, "
                "so what the assistant says cannot be told; mark it in the template by {% generation %}"
            )
        found.append((len(before), len(after.rstrip())))
    return found


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    document: Chat,
    messages: list[dict[str, Any]] | None = None,
    *,
    prompt: bool = False,
) -> str:
    """The text of a conversation, or of the first of its messages.

    prompt: with what comes before the assistant's next words
    """
    try:
        text = tokenizer.apply_chat_template(
            document.messages if messages is None else messages,
            tools=document.tools,  # pyright: ignore[reportArgumentType] - as they stand in the row
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except Exception as error:
        raise InputError(f"{document.where}: the tokenizer's chat template refuses it: {_line(error)}") from error
    return str(text)


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
