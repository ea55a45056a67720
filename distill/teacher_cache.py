"""Keeping what a teacher says of a text, so that students can learn from it when the teacher is gone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wtool.calibration_data import Windows
from wtool.calibration_data.tokens import identity as tokenizer_identity
from wtool.checkpoint import Checkpoint
from wtool.checkpoint.tied import embedding_name, head_name
from wtool.errors import InputError, MissingInput
from wtool.loading import load_model, load_tokenizer
from wtool.statistics_folder import identity

from .signal_cache import CacheWriter, Kind, Mode
from .signals import Kept, of_hidden, sample, top_k
from .teacher import OnlineTeacher, StreamedTeacher, Whole


@dataclass(frozen=True)
class Signals:
    """What to keep of what a teacher says."""

    mode: Mode = "top-k"  # or "sample"
    k: int = 32  # tokens kept of each distribution
    temperature: float = 1.0  # that its logits are divided by
    seed: int = 0  # of a sample


def about(
    teacher: Checkpoint, windows: Windows, asked: Signals, *, dtype: str, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What a cache was made of, for its manifest."""
    try:
        tokenizer = tokenizer_identity(load_tokenizer(teacher, trust_remote_code=trust_remote_code))
    except MissingInput:
        tokenizer = None
    return {
        "teacher": teacher.label,
        "teacher_files": identity(teacher),
        "tokenizer": tokenizer,
        "text": windows.record,
        "computed_in": dtype,
        **({"seed": asked.seed} if asked.mode == "sample" else {}),
    }


def make_teacher(
    checkpoint: Checkpoint, *, dtype: str, device: str, stream: bool, trust_remote_code: bool = False
) -> OnlineTeacher | StreamedTeacher:
    """The teacher, in memory or streamed.

    dtype: safetensors name of the type to compute in

    raises: InputError
    """
    if stream:
        return StreamedTeacher(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    model = load_model(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return OnlineTeacher(model)


def kind_of(checkpoint: Checkpoint, asked: Signals) -> Kind:
    """What is kept of each token, told from headers alone; no more tokens than there are.

    raises: InputError where the vocabulary is not known
    """
    name = head_name(checkpoint.tensors) or embedding_name(checkpoint.tensors)
    if name is None:
        raise InputError(f"{checkpoint.label}: neither output head nor embedding is known here by its name")
    vocabulary = checkpoint.tensors[name].shape[0]
    return Kind(asked.mode, min(asked.k, vocabulary), vocabulary, asked.temperature)


def write_signals(
    teacher: OnlineTeacher | StreamedTeacher,
    windows: Sequence[Tensor],
    writer: CacheWriter,
    asked: Signals,
    *,
    device: str,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda windows: None,
) -> None:
    """Let the teacher speak of each window that is not in the cache yet.

    windows: int64 [tokens] each
    batch_tokens: tokens run at a time, one window at least
    progress: is told the windows done

    raises: InputError where what it says is not finite
    """
    progress(writer.done)
    for numbers in _batches(windows, writer.done, batch_tokens):
        ids = torch.stack([windows[number] for number in numbers]).to(device)
        said = teacher.say({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
        targets = said.targets
        assert targets is not None, "a teacher that is asked says something"
        for place, number in enumerate(numbers):
            rows = slice(place * ids.shape[1], (place + 1) * ids.shape[1])
            if isinstance(targets, Whole):
                kept = _tell(asked, number, device)(targets.logits[rows].float())
            else:
                part = targets.rows(rows)  # pyright: ignore[reportAttributeAccessIssue]
                kept = of_hidden(part.hidden, part.head, _tell(asked, number, device))  # pyright: ignore
            _check(kept, number)
            writer.put(number, kept.to("cpu"))
        progress(len(numbers))


def _batches(windows: Sequence[Tensor], first: int, tokens: int) -> Iterator[list[int]]:
    """Numbers of windows from `first` on, in their order; those of one length that follow each other together."""
    numbers: list[int] = []
    for number in range(first, len(windows)):
        alike = numbers and len(windows[numbers[0]]) == len(windows[number])
        if numbers and not (alike and (len(numbers) + 1) * len(windows[number]) <= tokens):
            yield numbers
            numbers = []
        numbers.append(number)
    if numbers:
        yield numbers


def _tell(asked: Signals, window: int, device: str) -> Callable[[Tensor], Kept]:
    if asked.mode == "top-k":
        return lambda logits: top_k(logits, asked.k, temperature=asked.temperature)
    generator = torch.Generator(device).manual_seed((asked.seed << 32) + window)
    return lambda logits: sample(logits, asked.k, temperature=asked.temperature, generator=generator)


def _check(kept: Kept, window: int) -> None:
    values = kept.log_probs if hasattr(kept, "log_probs") else kept.log_weights  # pyright: ignore
    if values.isnan().any():
        raise InputError(f"window {window}: the teacher says NaN; take another type to compute in (--compute-dtype)")
