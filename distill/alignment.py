"""A student and a teacher with different tokenizers: where both have read the same text.

Both tokenizers cut a window's text. Where a token of the one ends at the same character as a token of the other, both
foretell what follows the same text, and are compared there (by `uld`, as their vocabularies differ); elsewhere nothing
is learnt. Boizard et al., "Towards Cross-Tokenizer Distillation", 2024, https://arxiv.org/abs/2402.12030 compare the
first tokens with the first ones instead, which after a few tokens are of other places in the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wtool.errors import InputError, Mismatch
from wtool.evaluate import encode

from .data import Texts, split


@dataclass(frozen=True)
class Alignment:
    """A window in two tokenizations, and the positions after which both have read the same text."""

    ours: Tensor  # the student's tokens, int64 [tokens]
    theirs: Tensor  # the teacher's, int64 [other tokens]
    ours_at: Tensor  # int64 [places], rising; the last of the student's positions is none, as it has no label
    theirs_at: Tensor  # int64 [places], rising


def align(text: str, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> Alignment:
    """Cut a text by two tokenizers, and find where tokens of both end."""
    our_ids, our_ends = _cut(ours, text)
    their_ids, their_ends = _cut(theirs, text)
    place_of = {end: place for place, end in enumerate(their_ends)}  # of several that end there, the last
    last_of = {end: place for place, end in enumerate(our_ends)}
    pairs = [
        (place, place_of[end])
        for place, end in enumerate(our_ends[:-1])
        if end in place_of and last_of[end] == place and end > 0
    ]
    found = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return Alignment(torch.tensor(our_ids), torch.tensor(their_ids), found[:, 0], found[:, 1])


def aligned_texts(
    texts: Texts, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, held_out: int, seed: int
) -> tuple[Texts, dict[int, Alignment]]:
    """The windows' texts, cut anew by both tokenizers.

    raises: InputError where no place is common, Mismatch for a tokenizer that does not tell where its tokens lie
    """
    for each in (ours, theirs):
        if not each.is_fast:
            raise Mismatch(f"a {type(each).__name__} does not tell where in a text its tokens lie; uld needs that")
    cut = [align(_text(ours, window), ours, theirs) for window in texts.windows]
    known = {number: each for number, each in enumerate(cut) if len(each.ours_at)}
    if len(known) < 2:
        raise InputError("the two tokenizers have no place in the text in common")
    kept = list(known.values())
    windows = tuple(each.ours for each in kept)
    train, judged = split(windows, held_out, seed)
    places = sum(len(each.ours_at) for each in kept)
    record = {**texts.record, "aligned": {"places": places, "tokens": sum(map(len, windows))}}
    return replace(texts, windows=windows, train=train, held_out=judged, record=record), dict(enumerate(kept))


def places_mask(alignments: Mapping[int, Alignment], numbers: Sequence[int], width: int) -> Tensor:
    """Where windows are learnt, bool [windows, width]."""
    mask = torch.zeros(len(numbers), width, dtype=torch.bool)
    for row, number in enumerate(numbers):
        mask[row, alignments[number].ours_at] = True
    return mask


def their_batch(alignments: Mapping[int, Alignment], numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the teacher reads, int64 [windows, tokens], padded on the right; and where it is asked, a bool mask."""
    width = max(len(alignments[number].theirs) for number in numbers)
    ids = torch.zeros(len(numbers), width, dtype=torch.int64)
    asked = torch.zeros_like(ids, dtype=torch.bool)
    for row, number in enumerate(numbers):
        each = alignments[number]
        ids[row, : len(each.theirs)] = each.theirs
        asked[row, each.theirs_at] = True
    return ids, asked


def _text(tokenizer: PreTrainedTokenizerBase, window: Tensor) -> str:
    return str(tokenizer.decode(window.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """A text's tokens, a BOS before them where the tokenizer puts one, and at which character each ends."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in found["offset_mapping"]]
    _, bos = encode(tokenizer, "")
    return ([bos, *found["input_ids"]], [0, *ends]) if bos is not None else (list(found["input_ids"]), ends)
