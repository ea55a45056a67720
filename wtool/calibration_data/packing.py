"""From documents to windows of tokens.

Plain texts are put one behind the other, each with its BOS and EOS, into one stream, which is cut into windows. It
ends with the last text, or as soon as it is long enough, and the windows wanted are taken from all over it. Where the
tokenizer puts a BOS in front of a text, each window begins with one, in the place of its first token, as in
`wtool eval`. Conversations are not cut: each goes whole into the first window that has room for it; only one that is
longer than a window loses its end. Rows of token ids are a window each.

The documents of a source come in an order that the seed decides; of several sources that one is next which gave the
fewest tokens so far, so that all are heard alike. Nothing here depends on the machine or on a library's version: of
`random` only what Python promises to keep is used, the sequence of `random()`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from wtool.calibration_data.rows import Chat, Document, Rows, Text, Tokens, is_empty
from wtool.calibration_data.tokens import of_chat, of_text, spoken
from wtool.errors import InputError, MalformedFile
from wtool.evaluate import encode

Ids = list[int]
Spoken = list[tuple[int, bool]]  # tokens, and whether the assistant says them
NAMES = {Text: "text", Chat: "conversation", Tokens: "list of token ids"}


@dataclass(frozen=True)
class Wish:
    """What windows are wanted."""

    samples: int  # at most
    length: int  # tokens, at most
    pool: int  # tokens of text to choose from, if there are as many
    seed: int
    assistant_only: bool = False  # conversations, and which of their tokens the assistant says


@dataclass(frozen=True)
class Packed:
    """Windows, and at what price."""

    windows: list[Any]  # Ids, or Spoken where that is asked for
    shortened: int = 0  # conversations or rows that lost their end


def pack(rows: Sequence[Rows], tokenizer: PreTrainedTokenizerBase | None, wish: Wish) -> Packed:
    """Cut the documents of all sources into windows; sources of several kinds get equal shares.

    raises: InputError
    """
    kinds: dict[type[Document], list[Rows]] = {}
    for each in rows:
        kinds.setdefault(_kind(each), []).append(each)
    parts = [_pack_kind(kind, theirs, tokenizer, wish) for kind, theirs in kinds.items()]
    counts = shares(wish.samples, [len(part.windows) for part in parts], [len(theirs) for theirs in kinds.values()])
    taken = [
        part.windows[place]
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        for place in chosen(len(part.windows), count, Random(f"{wish.seed} kind {number}"))
    ]
    return Packed(taken, sum(part.shortened for part in parts))


def _pack_kind(kind: type[Document], rows: list[Rows], tokenizer: PreTrainedTokenizerBase | None, wish: Wish) -> Packed:
    if wish.assistant_only and kind is not Chat:
        raise InputError(
            f"{rows[0].label}: a {NAMES[kind]} in each row, where what the assistant says is asked for: give "
            "conversations (messages), or leave assistant_only out"
        )
    if kind is Tokens:
        return _tokens(rows, wish)
    if tokenizer is None:
        raise InputError(
            f"{rows[0].label}: text, and the model has no tokenizer to read it with; give rows of input_ids"
        )
    return _texts(rows, tokenizer, wish) if kind is Text else _chats(rows, tokenizer, wish)


def _texts(rows: list[Rows], tokenizer: PreTrainedTokenizerBase, wish: Wish) -> Packed:
    """One stream, cut every `length` tokens; what is left at its end is dropped, unless it is all there is."""
    stream: Ids = []
    for _, ids in _in_turn(rows, Text, lambda document: of_text(tokenizer, document), wish.seed):
        stream += ids
        if len(stream) >= wish.pool:
            break
    if len(stream) < wish.length:
        return Packed([stream] if stream else [])
    places = chosen(len(stream) // wish.length, wish.samples, Random(f"{wish.seed} windows"))
    windows = [stream[place * wish.length : (place + 1) * wish.length] for place in places]
    _, bos = encode(tokenizer, "")
    return Packed(windows if bos is None else [[bos, *window[1:]] for window in windows])


def _chats(rows: list[Rows], tokenizer: PreTrainedTokenizerBase, wish: Wish) -> Packed:
    """Conversations as they come, up to twice what is needed, so that small ones fill the gaps."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{rows[0].label}: conversations, and the model's tokenizer has no chat template; "
            "give plain text, or put a chat_template.jinja beside the tokenizer"
        )
    windows: list[Any] = []
    shortened = seen = 0
    tokenize = spoken if wish.assistant_only else of_chat
    for _, ids in _in_turn(rows, Chat, lambda document: tokenize(tokenizer, document), wish.seed):
        kept = ids[: wish.length]
        room = next((window for window in windows if len(window) + len(kept) <= wish.length), None)
        if room is None and len(windows) < wish.samples:
            windows.append(room := [])
        if room is not None:
            room += kept
            shortened += len(kept) < len(ids)
        seen += len(kept)
        if seen >= 2 * wish.samples * wish.length:
            break
    return Packed(windows, shortened)


def _tokens(rows: list[Rows], wish: Wish) -> Packed:
    """Rows of ids, in the order of their files."""
    found: list[tuple[tuple[int, int], Ids]] = []
    for place, ids in _in_turn(rows, Tokens, lambda document: document.ids, wish.seed):
        found.append((place, ids))
        if len(found) == wish.samples:
            break
    windows = [ids for _, ids in sorted(found)]
    shortened = sum(len(window) > wish.length for window in windows)
    return Packed([window[: wish.length] for window in windows], shortened)


def _in_turn(
    rows: Sequence[Rows], kind: type[Document], tokenize: Callable[..., list[Any]], seed: int
) -> Iterator[tuple[tuple[int, int], list[Any]]]:
    """Yield documents as (source, number) and tokens, next from the source that gave the fewest tokens so far."""
    orders = [iter(order(each.count, Random(f"{seed} source {number}"))) for number, each in enumerate(rows)]
    given = dict.fromkeys(order(len(rows), Random(f"{seed} sources")), 0)  # the first of equals is next
    while given:
        source = min(given, key=lambda number: given[number])
        number = next(orders[source], None)
        if number is None:
            del given[source]
            continue
        document = rows[source].read(number)
        if is_empty(document):
            continue
        if not isinstance(document, kind):
            raise MalformedFile(f"{document.where}: a {NAMES[type(document)]} among rows that are a {NAMES[kind]} each")
        ids = tokenize(document)
        given[source] += len(ids)
        if ids:
            yield (source, number), ids


def _kind(rows: Rows) -> type[Document]:
    """What a source holds, told by its first document that is not empty."""
    return next((type(each) for each in map(rows.read, range(rows.count)) if not is_empty(each)), Text)


def order(count: int, random: Random) -> list[int]:
    """The numbers below `count` in a random order."""
    keys = np.fromiter((random.random() for _ in range(count)), np.float64, count)
    return np.argsort(keys, kind="stable").tolist()


def chosen(count: int, wanted: int, random: Random) -> list[int]:
    """`wanted` of the numbers below `count`, one at random of each of `wanted` equal ranges; all if there are fewer."""
    if count <= wanted:
        return list(range(count))
    edges = [number * count // wanted for number in range(wanted + 1)]
    return [low + int(random.random() * (high - low)) for low, high in zip(edges, edges[1:], strict=False)]


def shares(wanted: int, available: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Hand out `wanted` things by weight to those that have room for `available` each; what one lacks others get."""
    given = [0] * len(available)
    for _ in range(min(wanted, sum(available))):
        hungry = [number for number in range(len(given)) if given[number] < available[number]]
        given[min(hungry, key=lambda number: given[number] / weights[number])] += 1
    return given
