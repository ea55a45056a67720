"""The windows of tokens that a calibration runs through a model, and the record of how they came about."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from wtool.calibration_data.packing import Ids, Packed, Wish, pack
from wtool.calibration_data.source import CalibrationSource, open_rows
from wtool.calibration_data.tokens import identity
from wtool.errors import InputError, Mismatch
from wtool.writer import checksum

OWN_TEXT = (
    "calibrating on the text that Python carries, its manual and its library: the result is better "
    "with text like that which the model is to read (--calib FILE)"
)


@dataclass(frozen=True)
class Windows:
    """What to run through a model."""

    ids: Tensor  # int64 [samples, length]; 0 where masked
    mask: Tensor | None  # bool [samples, length], False beyond a window's end; None where all are full
    record: dict[str, Any]  # for the manifest (JSON)
    warnings: tuple[str, ...] = ()  # what may cost quality, a line each
    remarks: tuple[str, ...] = ()  # what else the user should know
    spoken: Tensor | None = None  # bool [samples, length], what the assistant says; None where that is not asked for

    @property
    def tokens(self) -> int:
        """How many there are, without the masked ones."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def unpadded(self) -> list[Tensor]:
        """Each window without what is masked, int64 [tokens]."""
        if self.mask is None:
            return list(self.ids)
        return [ids[mask] for ids, mask in zip(self.ids, self.mask, strict=True)]

    def spoken_unpadded(self) -> list[Tensor]:
        """As `unpadded`, what the assistant says, bool [tokens]; none where that is not asked for."""
        if self.spoken is None:
            return []
        masks = torch.ones_like(self.spoken) if self.mask is None else self.mask
        return [spoken[mask] for spoken, mask in zip(self.spoken, masks, strict=True)]


def windows(
    source: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> Windows:
    """Read, tokenize and cut the calibration text.

    tokenizer: the model's; rows of token ids need none
    limit: positions the model has, where it says; no window is longer
    vocabulary: rows of the model's embedding; a token beyond them is an error

    returns: as many windows as asked for, or as the text gives; all of one length but where one is masked
    raises: InputError, RuntimeProblem
    """
    length = min(source.length, limit or source.length)
    rows = open_rows(source)
    wish = Wish(source.samples, length, source.pool(length), source.seed, source.assistant_only)
    packed = pack(rows, tokenizer, wish)
    if not packed.windows:
        raise InputError(f"{', '.join(each.label for each in rows)}: no text to calibrate on")
    found, spoken = _parted(packed) if source.assistant_only else (packed.windows, None)
    largest = max(map(max, found))
    if vocabulary is not None and largest >= vocabulary:
        raise Mismatch(f"the calibration text has token {largest}, but the model's vocabulary has {vocabulary}")
    ids, mask = padded(found)
    record = {
        "sources": [each.record for each in rows],
        "samples": len(packed.windows),
        "length": ids.shape[1],
        "tokens": sum(map(len, packed.windows)),
        "seed": source.seed,
        "tokenizer": identity(tokenizer) if tokenizer else None,
        "ids_xxh3": checksum(repr(packed.windows).encode()),
    } | ({} if spoken is None else {"assistant_only": True, "spoken": int(spoken.sum())})
    return Windows(ids, mask, record, _warnings(packed, source, length), _remarks(packed, source, length), spoken)


def _parted(packed: Packed) -> tuple[list[Ids], Tensor]:
    """The tokens of each window, and which of them the assistant says, bool [samples, length]."""
    spoken, _ = padded([[int(said) for _, said in window] for window in packed.windows])
    return [[token for token, _ in window] for window in packed.windows], spoken.bool()


def padded(found: list[Ids]) -> tuple[Tensor, Tensor | None]:
    """Windows as one tensor as wide as the longest, int64 [windows, tokens], and where its tokens are."""
    lengths = torch.tensor([len(window) for window in found])
    width = int(lengths.max())
    ids = torch.tensor([[*window, *[0] * (width - len(window))] for window in found])
    mask = torch.arange(width) < lengths[:, None]
    return ids, None if mask.all() else mask


def _warnings(packed: Packed, source: CalibrationSource, length: int) -> tuple[str, ...]:
    count = len(packed.windows)
    if count == 1 and len(packed.windows[0]) < length:
        tokens = len(packed.windows[0])
        return (f"the calibration text has {tokens} tokens, {source.samples} windows of {length} were asked for",)
    if count < source.samples:
        return (
            f"the calibration text is enough for {count} windows of {length} tokens, not for the {source.samples} "
            "asked for",
        )
    return ()


def _remarks(packed: Packed, source: CalibrationSource, length: int) -> tuple[str, ...]:
    remarks: list[str] = []
    if not source.references:
        remarks.append(OWN_TEXT)
    if length < source.length:
        remarks.append(f"calibration windows are {length} tokens, not {source.length}: the model has no more positions")
    if packed.shortened:
        remarks.append(f"{packed.shortened} rows are longer than a calibration window of {length} and lose their end")
    return tuple(remarks)
