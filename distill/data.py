"""Windows of tokens to learn from, those that are held out, and how a batch is laid out.

A label is the token that follows: labels[t] = ids[t + 1]. The last token of a window has none, and neither has what
is only padding. Padding is on the right, where a causal model's earlier tokens never see it, so no mask is needed.

With documents kept apart, positions count from 0 again after each end of text, which makes transformers lay a mask of
blocks over the window; and the first token of a document is nobody's label, as nothing before it foretells it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wtool.calibration_data import CalibrationSource
from wtool.calibration_data.for_model import windows_for
from wtool.checkpoint import Checkpoint
from wtool.errors import InputError

from .recipe import Data

IGNORED = -100  # the label of what is not to be learnt


@dataclass(frozen=True)
class Texts:
    """What a student is trained on, and what it is judged by."""

    windows: tuple[Tensor, ...]  # int64 [tokens] each
    train: tuple[int, ...]  # numbers of windows
    held_out: tuple[int, ...]
    record: dict[str, Any]  # for the manifest (JSON)
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    spoken: tuple[Tensor, ...] | None = None  # bool [tokens] each: what the assistant says, where only that is learnt

    @property
    def tokens(self) -> int:
        """Tokens with a label in one pass over the training windows."""
        if self.spoken is not None:
            return sum(int(self.spoken[number][1:].sum()) for number in self.train)
        return sum(len(self.windows[number]) - 1 for number in self.train)


def read_texts(checkpoint: Checkpoint, asked: Data, samples: int, *, trust_remote_code: bool = False) -> Texts:
    """Cut the text into windows for the model that is to read it.

    samples: windows wanted, those to hold out among them

    raises: InputError, RuntimeProblem
    """
    found = windows_for(checkpoint, _source(asked, asked.sources, samples), trust_remote_code=trust_remote_code)
    windows, spoken = found.unpadded(), found.spoken_unpadded()
    record: dict[str, Any] = {"training": found.record}
    warnings, remarks = found.warnings, found.remarks
    if asked.held_out_sources:
        wanted = _source(asked, asked.held_out_sources, asked.held_out)
        other = windows_for(checkpoint, wanted, trust_remote_code=trust_remote_code)
        train = tuple(range(len(windows)))
        windows += other.unpadded()
        spoken += other.spoken_unpadded()
        held_out = tuple(range(len(train), len(windows)))
        record["held_out"] = other.record
        warnings += other.warnings
    else:
        train, held_out = split(windows, asked.held_out, asked.seed)
        record["held_out"] = {"windows": len(held_out), "of": "the training text"}
    words = tuple(text.replace("calibration ", "").replace("calibrating", "training") for text in warnings)
    told = tuple(text.replace("calibration ", "").replace("calibrating", "training") for text in remarks)
    texts = Texts(tuple(windows), train, held_out, record, words, told, tuple(spoken) if spoken else None)
    if spoken and not (texts.tokens and any(spoken[number][1:].any() for number in held_out)):
        raise InputError("the assistant says nothing in the windows to train on or in those held out; give more text")
    return texts


def split(windows: Sequence[Tensor], wanted: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose windows to hold out, a fifth at most; one that repeats a held-out window is not trained on either.

    returns: numbers of the windows to train on, and of those held out

    raises: InputError where no window is left for one of the two
    """
    count = min(wanted, max(1, len(windows) // 5))
    chance = Random(f"{seed} held out")
    order = sorted(range(len(windows)), key=lambda number: (chance.random(), number))
    held_out = tuple(sorted(order[:count]))
    known = {tuple(windows[number].tolist()) for number in held_out}
    train = tuple(n for n in range(len(windows)) if n not in held_out and tuple(windows[n].tolist()) not in known)
    if not train:
        raise InputError(
            f"the text gives {len({tuple(window.tolist()) for window in windows})} different window(s), too few to "
            "train on some and hold out others; give more text or a smaller --seqlen"
        )
    return train, held_out


def _source(asked: Data, sources: tuple[str, ...], samples: int) -> CalibrationSource:
    return CalibrationSource(
        sources,
        samples,
        asked.seqlen,
        asked.seed,
        text_column=asked.text_column,
        split=asked.split,
        assistant_only=asked.assistant_only,
    )


class Numbered(Dataset[dict[str, Any]]):
    """Some of the windows, each with its number."""

    def __init__(self, windows: Sequence[Tensor], numbers: Sequence[int]):
        self._windows, self._numbers = windows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = self._numbers[place]
        return {"number": number, "ids": self._windows[number]}


@dataclass(frozen=True)
class Collate:
    """Lays windows side by side."""

    end: int | None = None  # the token that ends a document, where documents are kept apart
    learnt: Callable[[Sequence[int], int], Tensor] | None = None  # numbers, width -> where to learn, where not all is

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        returns: input_ids and labels, int64 [windows, tokens]; numbers, int64 [windows]; where documents are kept
                 apart position_ids, int64 [windows, tokens]
        """
        width = max(len(item["ids"]) for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for row, item in enumerate(items):
            window = item["ids"]
            ids[row, : len(window)] = window
            labels[row, : len(window) - 1] = window[1:]
        numbers = [item["number"] for item in items]
        if self.learnt is not None:
            labels = labels.masked_fill(~self.learnt(numbers, width), IGNORED)
        batch = {"input_ids": ids, "labels": labels, "numbers": torch.tensor(numbers)}
        if self.end is not None:
            batch["labels"] = labels.masked_fill(ids == self.end, IGNORED)
            batch["position_ids"] = restarting_positions(ids, self.end)
        return batch


def spoken_mask(spoken: Sequence[Tensor], numbers: Sequence[int], width: int) -> Tensor:
    """Where the next token is one that the assistant says, bool [windows, width].

    spoken: bool [tokens] of each window
    """
    mask = torch.zeros(len(numbers), width, dtype=torch.bool)
    for row, number in enumerate(numbers):
        mask[row, : len(spoken[number]) - 1] = spoken[number][1:]
    return mask


def restarting_positions(ids: Tensor, end: int) -> Tensor:
    """Positions that count from 0 again after each `end`.

    ids: [windows, tokens]
    returns: int64 [windows, tokens]
    """
    places = torch.arange(ids.shape[1]).expand_as(ids)
    begins = torch.zeros_like(ids)
    begins[:, 1:] = torch.where(ids[:, :-1] == end, places[:, 1:], 0)
    return places - begins.cummax(dim=1).values
