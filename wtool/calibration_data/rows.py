"""Documents to calibrate on, and how a row of a JSON file or a dataset is read as one."""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from wtool.errors import InputError, MalformedFile, did_you_mean

KEYS = ("input_ids", "messages", "conversations", "text")  # the first that a row has is taken

# What ShareGPT and its like call those who speak -> what chat templates call them
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "function": "tool"}


@dataclass(frozen=True)
class Text:
    """A plain text."""

    where: str  # for errors: file and line
    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation, as chat templates take one."""

    where: str
    messages: list[dict[str, Any]]  # role, content and what else the template knows
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Tokens:
    """A row that is tokenized already."""

    where: str
    ids: list[int]


Document = Text | Chat | Tokens


def content(document: Document) -> Any:
    """What a document holds, wherever it lies."""
    return astuple(document)[1:]


def is_empty(document: Document) -> bool:
    """Whether there is nothing in a document; whatever its kind, it is passed over."""
    match document:
        case Text(text=text):
            return not text.strip()
        case Chat(messages=messages):
            return not messages
        case Tokens(ids=ids):
            return not ids


@dataclass(frozen=True)
class Rows:
    """The documents of one source, each read when its turn comes."""

    label: str  # as the user wrote it
    count: int
    read: Callable[[int], Document]  # of a document's number, from 0
    record: dict[str, Any]  # what it was, for the manifest (JSON)


def find_key(row: Any, where: str, column: str | None = None) -> str:
    """Tell which key of a row holds what is to be calibrated on.

    column: the key the user named; None takes the first of KEYS
    raises: MalformedFile where the row is no object, InputError where there is no such key
    """
    if not isinstance(row, Mapping):
        raise MalformedFile(
            f"{where}: a row of type {type(row).__name__}, where an object like {{'text': …}} is expected"
        )
    if column is not None:
        if column not in row:
            raise InputError(f"{where}: no '{column}'{did_you_mean(column, row)} (it has {_listed(row)})")
        return column
    for key in KEYS:
        if key in row:
            return key
    meant = next((hint for key in row if (hint := did_you_mean(key, KEYS))), "")
    raise InputError(
        f"{where}: none of {', '.join(KEYS)}{meant} (it has {_listed(row)}; --text-column names the one to take)"
    )


def document(row: Any, where: str, key: str) -> Document:
    """Read a row.

    key: what `find_key` told of the first row of the file
    raises: InputError where the row has no such key, MalformedFile where its value cannot be meant
    """
    value = row[find_key(row, where, key)]
    if value is None:
        return Text(where, "")
    if isinstance(value, str):
        return Text(where, value)
    if isinstance(value, list):
        if all(type(each) is int for each in value):
            return Tokens(where, _unpadded(value, row.get("attention_mask"), where))
        if all(isinstance(each, Mapping) for each in value):
            return Chat(where, [_message(each, where) for each in value], row.get("tools") or None)
    raise MalformedFile(
        f"{where}: '{key}' is of type {_kind(value)}, not a text, a list of messages or a list of token ids"
    )


def _unpadded(ids: list[int], mask: Any, where: str) -> list[int]:
    if mask is not None:
        if not isinstance(mask, list) or len(mask) != len(ids):
            raise MalformedFile(f"{where}: 'attention_mask' is not a list as long as the {len(ids)} token ids")
        ids = [number for number, seen in zip(ids, mask, strict=True) if seen]
    if ids and min(ids) < 0:
        raise MalformedFile(f"{where}: token id {min(ids)} is negative")
    return ids


def _message(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "role" in entry:
        return dict(entry)
    if "from" in entry and "value" in entry:
        return {"role": ROLES.get(str(entry["from"]), entry["from"]), "content": entry["value"]}
    raise MalformedFile(f"{where}: a message with {_listed(entry)}; it needs role and content (or from and value)")


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no key"


def _kind(value: Any) -> str:
    return f"list of {type(value[0]).__name__}" if isinstance(value, list) else type(value).__name__
