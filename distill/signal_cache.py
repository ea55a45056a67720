"""What a teacher said of a text, on disk: made once, and the teacher is not needed again.

    OUT/
        signals-00000.safetensors …   some windows each: their tokens, and what the teacher said (signal_codec.py)
        wtool.json                    the teacher, the text, and how it was asked

Entry t of a window tells of the token after position t. While the work goes on the files are in a hidden folder beside
the output, each put there whole, so work that was stopped goes on after the last of them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from wtool import __version__
from wtool.checkpoint.safetensors import SafetensorsFile
from wtool.errors import MalformedFile, MissingInput, OutputExists, UnfinishedWork, UsageError
from wtool.shards import json_bytes
from wtool.writer import MANIFEST, checksum, disk_errors, take_lock, work_folder

from .signal_codec import bytes_per_token, decode, encode
from .signals import Kept

SHARD_TOKENS = 1 << 18  # tokens of a file, or a little more; 25 MB at k = 32
SHIFT = "entry t tells of the token after position t"
Mode = Literal["top-k", "sample"]


@dataclass(frozen=True)
class Kind:
    """What is kept of each token.

    mode:        the k most likely tokens with the mass of the others, or an unbiased sample of k
    vocabulary:  tokens the teacher chooses among, at most 2^24
    temperature: that its logits were divided by
    """

    mode: Mode
    k: int
    vocabulary: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.vocabulary:
            raise UsageError(f"k {self.k}: 1 to {self.vocabulary} tokens, the teacher's vocabulary, can be kept")

    @property
    def bytes_per_token(self) -> int:
        """On disk, without the token itself."""
        return bytes_per_token(self.k, self.vocabulary)


def fingerprint(about: Mapping[str, Any], windows: Sequence[Tensor], kind: Kind) -> str:
    """Tells a cache from any other: teacher and text as the manifest tells of them, every token, what is kept."""
    tokens = hashlib.sha256("".join(checksum(_stored(window)) for window in windows).encode()).hexdigest()
    identity = {"wtool": __version__, "about": about, "tokens": tokens, "kind": vars(kind), "shard": SHARD_TOKENS}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


class CacheWriter:
    """Writes a cache file by file; use it as a context manager, put all windows in their order, end with `commit`.

    about:   the teacher and the text, for the manifest (JSON)
    windows: ids of tokens [tokens] each
    force:   replace an output that is there already, and discard half-done work of another fingerprint

    raises: UsageError, OutputExists, UnfinishedWork
    """

    def __init__(
        self,
        out: Path,
        about: Mapping[str, Any],
        *,
        windows: Sequence[Tensor],
        mode: Mode = "top-k",
        k: int,
        vocabulary: int,
        temperature: float = 1.0,
        force: bool = False,
    ):
        self.out, self.about, self.windows = out, about, windows
        self.kind = Kind(mode, k, vocabulary, temperature)
        self.fingerprint = fingerprint(about, windows, self.kind)
        self.work = work_folder(out)
        self._shards = list(_divide(windows))
        self._pending: list[dict[str, Tensor]] = []
        if out.exists() and (not force or not out.is_dir()):
            raise OutputExists(f"{out}: there already{'' if out.is_file() else '; --force replaces it'}")
        with disk_errors(out):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.work, out)
            try:
                self._prepare(force)
            except BaseException:
                os.close(self._lock)
                raise

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    @property
    def done(self) -> int:
        """How many windows are written; work goes on with the window of this number."""
        return self._shards[self._whole].start if self._whole < len(self._shards) else len(self.windows)

    def put(self, number: int, said: Kept) -> None:
        """Take what was said of a window's tokens, all of them; windows come in their order, from `done` on."""
        shard = self._shards[self._whole]
        assert number == shard.start + len(self._pending), f"window {number}"
        assert len(said.ids) == len(self.windows[number]) and said.ids.shape[1] == self.kind.k
        self._pending.append(encode(said.to("cpu"), self.kind.vocabulary))
        if number + 1 == shard.stop:
            self._write(shard)

    def commit(self) -> None:
        """Let the folder appear under its name."""
        assert self.done == len(self.windows)
        folder = self.work / "output"
        signals = {
            **vars(self.kind),
            "shift": SHIFT,
            "bytes_per_token": self.kind.bytes_per_token,
            "windows": len(self.windows),
            "tokens": sum(map(len, self.windows)),
            "files": len(self._shards),
        }
        manifest = {"wtool": __version__, "fingerprint": self.fingerprint, **self.about, "signals": signals}
        with disk_errors(self.out):
            (folder / MANIFEST).write_bytes(json_bytes(manifest))
            if self.out.exists():
                shutil.rmtree(self.work / "replaced", ignore_errors=True)
                self.out.rename(self.work / "replaced")
            folder.rename(self.out)
            shutil.rmtree(self.work)

    def _write(self, shard: range) -> None:
        columns = {name: torch.cat([each[name] for each in self._pending]) for name in self._pending[0]}
        columns["tokens"] = torch.cat([_stored(self.windows[number]) for number in shard])
        columns["lengths"] = torch.tensor([len(self.windows[number]) for number in shard], dtype=torch.int32)
        with disk_errors(self.out):
            half = self.work / "half"
            save_file(columns, half)
            with half.open("rb") as file:  # on the disk before it counts as done
                os.fsync(file.fileno())
            half.rename(self.work / "output" / _name(self._whole))
        self._pending, self._whole = [], self._whole + 1

    def _prepare(self, force: bool) -> None:
        label = self.work / "fingerprint"
        if label.is_file() and label.read_text() != self.fingerprint:
            if not force:
                raise UnfinishedWork(f"{self.work}: unfinished work of another teacher or text; --force discards it")
            shutil.rmtree(self.work / "output", ignore_errors=True)
        label.write_text(self.fingerprint)
        (self.work / "output").mkdir(exist_ok=True)
        there = [(self.work / "output" / _name(i)).is_file() for i in range(len(self._shards))]
        self._whole = [*there, False].index(False)


def is_cache(folder: Path) -> bool:
    """Whether a folder is a cache, by its manifest."""
    try:
        return "signals" in json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


class Cache:
    """What a teacher said of a text, read by memory map.

    raises: MissingInput, MalformedFile
    """

    def __init__(self, folder: Path):
        path = folder / MANIFEST
        if not path.is_file():
            raise MissingInput(
                f"{folder}: no teacher's signal here ({MANIFEST} is missing); `wtool teacher-cache` makes it"
            )
        if not is_cache(folder):
            raise MalformedFile(f"{path}: not of a teacher's signal; `wtool teacher-cache` makes one")
        self.folder = folder
        self.about: Mapping[str, Any] = json.loads(path.read_bytes())
        signals = self.about["signals"]
        self.kind = Kind(signals["mode"], signals["k"], signals["vocabulary"], signals["temperature"])
        self._files = [self._open(i) for i in range(signals["files"])]
        self._places = list(self._find())  # file, first token and end of each window
        if len(self._places) != signals["windows"]:
            raise MalformedFile(f"{folder}: {len(self._places)} windows, {MANIFEST} tells of {signals['windows']}")

    @cached_property
    def windows(self) -> list[Tensor]:
        """Ids of the tokens of each window, int64 [tokens]."""
        return [file.read("tokens")[begin:end].to(torch.int64) for file, begin, end in self._places]

    def targets(self, numbers: Sequence[int], positions: Tensor | None = None) -> Kept:
        """What was said of some windows' tokens, one window after the other.

        numbers:   of windows; at least one, any of them again
        positions: bool [windows, tokens] or [all tokens, one window after the other], True where it is wanted; rows
                   may go on beyond a window's end with anything
        """
        names = [name for name in self._files[0].tensors if name not in ("tokens", "lengths")]
        places = [self._places[number] for number in numbers]
        columns = {name: torch.cat([file.read(name)[begin:end] for file, begin, end in places]) for name in names}
        if positions is not None:
            wanted = _flat(positions, [end - begin for _, begin, end in places])
            columns = {name: column[wanted] for name, column in columns.items()}
        return decode(columns, self.kind.mode, self.kind.vocabulary)

    def _open(self, number: int) -> SafetensorsFile:
        path = self.folder / _name(number)
        if not path.is_file():
            raise MissingInput(f"{path}: missing; {MANIFEST} tells of {self.about['signals']['files']} files")
        return SafetensorsFile(path)

    def _find(self) -> Iterator[tuple[SafetensorsFile, int, int]]:
        for file in self._files:
            begin = 0
            for length in file.read("lengths").tolist():
                yield file, begin, begin + length
                begin += length


def _divide(windows: Sequence[Tensor]) -> Iterator[range]:
    """The windows of each file."""
    begin, tokens = 0, 0
    for number, window in enumerate(windows):
        tokens += len(window)
        if tokens >= SHARD_TOKENS or number + 1 == len(windows):
            yield range(begin, number + 1)
            begin, tokens = number + 1, 0


def _flat(positions: Tensor, lengths: Sequence[int]) -> Tensor:
    if positions.dim() == 1:
        return positions
    return torch.cat([row[:length] for row, length in zip(positions, lengths, strict=True)])


def _stored(window: Tensor) -> Tensor:
    return window.to("cpu", torch.int32)


def _name(number: int) -> str:
    return f"signals-{number:05}.safetensors"
