"""The streaming writer: headers first, tensors put in place as they come, one rename at the end.

Shapes and dtypes of every output are known from the plan, so each shard's safetensors header is written before
any data, and each tensor goes straight to its place, in any order, from any thread. No shard is ever in memory.

While the work goes on, everything is in a hidden folder beside the output:

    .NAME.wtool/
        lock           held by the process that writes
        journal        what is complete: a line a step, with a checksum of each tensor
        output/        what will be NAME
        parts/         files of it that other processes write (`wtool.executors.parts`)
        replaced/      what was NAME before, for a moment, under --force

The output appears under its name by a rename, when it is whole and on the disk. After a stop (kill -9, a full
disk, a lost machine) the same work goes on where it was: a tensor counts as done if the journal says so and its
bytes have the checksum written there. So the journal itself needs no care beyond whole lines.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import xxhash

from wtool.checkpoint.made import MANIFEST as MANIFEST
from wtool.dtypes import torch_dtype
from wtool.errors import DiskFull, OutputError, OutputExists, UnfinishedWork, UsageError
from wtool.placed_file import PlacedFile, Placement
from wtool.shards import INDEX, Shard, index_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

DOWNLOADS = "downloads"  # inputs that are here only while they are read
PARTS = "parts"
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")  # what is left of s3:// in a path
_DISK_THREADS = 4  # which wait for the device: as many writes as keep it busy
_TOGETHER = 1 << 18  # bytes that are put at once, and so are in the processor's cache when they are summed
_line = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # making an encoder a line takes longer


def checksum(data: "torch.Tensor | bytes") -> str:
    """xxh3-128 of a tensor's bytes, in hexadecimal."""
    return xxhash.xxh3_128(data if isinstance(data, bytes) else tensor_bytes(data)).hexdigest()


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """A contiguous tensor's memory."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class Placed:
    """A tensor on its way to its place, with the checksum of what was put there."""

    def __init__(self, placement: Placement, nbytes: int, out: Path):
        self._placement, self._nbytes, self._out = placement, nbytes, out
        self._sum = xxhash.xxh3_128()
        self.nbytes = 0

    @property
    def digest(self) -> str:
        return self._sum.hexdigest()

    def room(self, size: int) -> "NDArray[np.uint8]":
        """Memory for the next bytes; `filled` is to be told when they are there."""
        with disk_errors(self._out):
            return self._placement.room(size)

    def filled(self, room: "NDArray[np.uint8]") -> None:
        self._sum.update(room.data)
        self.nbytes += room.nbytes

    def put(self, data: memoryview) -> None:
        """Put the next bytes."""
        for begin in range(0, data.nbytes, _TOGETHER):
            part = data[begin : begin + _TOGETHER]
            room = self.room(part.nbytes)
            room.data[:] = part
            self.filled(room)

    def end(self) -> None:
        """Begin to write what is left; the thread may go on with another tensor."""
        assert self.nbytes == self._nbytes
        with disk_errors(self._out):
            self._placement.end()

    def wait(self) -> None:
        """Return when all is written."""
        with disk_errors(self._out):
            self._placement.wait()


class Writer:
    """Writes one checkpoint; use it as a context manager, and end with `commit`.

    out: the folder that will appear
    fingerprint: tells this work from any other; only work of the same fingerprint is continued
    force: replace an output that is there already, and discard half-done work of another fingerprint

    raises: OutputExists, UnfinishedWork, DiskFull
    """

    def __init__(self, out: Path, shards: Sequence[Shard], fingerprint: str, *, force: bool = False):
        self.out = out
        self.shards = shards
        self.fingerprint = fingerprint
        self.work = work_folder(out)
        self.folder = self.work / "output"
        self._shard_of = {name: shard for shard in shards for name in shard.tensors}
        self._missing = {shard.filename: len(shard.tensors) for shard in shards}
        self._guard = threading.Lock()
        self._disk = ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="disk")
        self._syncs: list[Future[None]] = []
        self._files: dict[str, PlacedFile] = {}
        self._check_place(force)
        with disk_errors(out):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = take_lock(self.work, out)
            self.done: dict[str, str] = {}  # tensor -> checksum
            self.notes: list[dict[str, Any]] = []  # what the steps told, in the order they ended
            try:
                self._prepare(force)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, tensors: "Mapping[str, torch.Tensor]", note: Mapping[str, Any] | None = None) -> None:
        """Put a step's tensors in their places and note them as done; any thread may call it.

        note: what else is to be known of the step after a restart (JSON)
        """
        sums: dict[str, str] = {}
        for name, tensor in tensors.items():
            placed = self.place(name)
            placed.put(tensor_bytes(tensor))
            placed.end()
            placed.wait()
            sums[name] = placed.digest
        self.note_done(sums, note or {})

    def place(self, name: str) -> Placed:
        """A tensor's place, to put its bytes there in their order; it is not done before `note_done` says so."""
        shard = self._shard_of[name]
        nbytes = shard.tensors[name].nbytes
        return Placed(self._files[shard.filename].place(shard.offsets[name], nbytes), nbytes, self.out)

    def read(self, name: str) -> "torch.Tensor":
        """A tensor that is done."""
        import torch

        shard = self._shard_of[name]
        info = shard.tensors[name]
        data, position, end = bytearray(), shard.offsets[name], shard.offsets[name] + info.nbytes
        while position < end:
            part = self._files[shard.filename].read(min(end - position, 1 << 24), position)
            data += part
            position += len(part)
        return torch.frombuffer(data, dtype=torch_dtype(info.dtype)).view(info.shape)

    def adopt(self, file: Path, done: Mapping[str, str], note: Mapping[str, Any]) -> None:
        """Move a whole file of the output, written by another process and on the disk, to its place.

        done: the checksum of each tensor in it
        note: as `write` takes it, of all steps
        """
        (shard,) = (shard for shard in self.shards if shard.filename == file.name)
        with disk_errors(self.out):
            file.rename(self.folder / file.name)
            self._files[file.name].close()
            self._files[file.name] = PlacedFile(self.folder / file.name, shard.size, self._disk)
            if fresh := {name: digest for name, digest in done.items() if name not in self.done}:
                self.note_done(fresh, note)

    def note_done(self, sums: Mapping[str, str], note: Mapping[str, Any]) -> None:
        """Note a step's tensors, whose bytes are in their places, as done.

        sums: their checksums
        note: as `write` takes it
        """
        line = _line({"done": sums, "note": note}).encode() + b"\n"
        with disk_errors(self.out), self._guard:
            assert self._journal is not None
            os.write(self._journal, line)
            self._count_done(sums, dict(note))

    def _count_done(self, sums: Mapping[str, str], note: dict[str, Any]) -> None:
        self.done.update(sums)
        self.notes.append(note)
        for name in sums:
            filename = self._shard_of[name].filename
            self._missing[filename] -= 1
            if not self._missing[filename]:  # the disk can start on it while the others are computed
                self._syncs.append(self._disk.submit(self._files[filename].sync))

    def commit(self, files: Mapping[str, bytes | Path]) -> None:
        """Add the files beside the weights, and let the output appear under its name.

        files: name -> content, or the file to copy
        """
        assert len(self.done) == len(self._shard_of)
        with disk_errors(self.out):
            if len(self.shards) > 1:
                files = {**files, INDEX: index_of(self.shards)}
            for name, content in files.items():
                data = content.read_bytes() if isinstance(content, Path) else content
                with (self.folder / name).open("wb") as file:
                    file.write(data)
                    os.fsync(file.fileno())
            for sync in self._syncs:
                sync.result()
            _sync_folder(self.folder)
            if self.out.exists():
                shutil.rmtree(self.work / "replaced", ignore_errors=True)
                self.out.rename(self.work / "replaced")
            self.folder.rename(self.out)
            _sync_folder(self.out.parent)
            self.close()
            shutil.rmtree(self.work)

    def close(self) -> None:
        """Let go of files and lock; what is unfinished stays, to be continued."""
        self._disk.shutdown()
        for file in self._files.values():
            file.close()
        for descriptor in (getattr(self, "_journal", None), self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._files, self._lock, self._journal = {}, None, None

    def _check_place(self, force: bool) -> None:
        if self.out.exists() and not force:
            raise OutputExists(f"{self.out}: there already; --force replaces it")
        if self.out.exists() and not self.out.is_dir():
            raise OutputExists(f"{self.out}: a file, not a folder; --force only replaces a folder")

    def _prepare(self, force: bool) -> None:
        journal = self.work / "journal"
        entries = _read_journal(journal)
        if entries and entries[0].get("fingerprint") != self.fingerprint:
            if not force:
                raise UnfinishedWork(
                    f"{self.work}: unfinished work of another recipe or of inputs that changed since; "
                    "--force discards it"
                )
            entries = []
        if not entries:
            for begun in (self.folder, self.work / PARTS):
                shutil.rmtree(begun, ignore_errors=True)
            with journal.open("wb") as file:
                file.write(json.dumps({"fingerprint": self.fingerprint}).encode() + b"\n")
        self.folder.mkdir(exist_ok=True)
        self._check_room()
        self._journal: int | None = os.open(journal, os.O_WRONLY | os.O_APPEND)
        if entries and not journal.read_bytes().endswith(b"\n"):
            os.write(self._journal, b"\n")  # end the line that a stop cut short
        for shard in self.shards:
            self._files[shard.filename] = self._open_shard(shard)
        for entry in entries[1:]:
            if not self.done.keys() & entry["done"] and self._is_intact(entry["done"]):
                self._count_done(entry["done"], entry["note"])

    def _open_shard(self, shard: Shard) -> PlacedFile:
        file = PlacedFile(self.folder / shard.filename, shard.size, self._disk)
        header = file.place(0, len(shard.header))
        header.room(len(shard.header)).data[:] = shard.header
        header.end()
        header.wait()
        return file

    def _check_room(self) -> None:
        present = sum(_allocated(file) for file in self.work.rglob("*") if DOWNLOADS not in file.parts)
        needed = sum(shard.size for shard in self.shards) - present
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise DiskFull(f"{self.out}: needs {needed:,} bytes more, the disk has {free:,} free")

    def _is_intact(self, sums: Mapping[str, str]) -> bool:
        """Whether the tensors' bytes on disk are those that the journal tells of."""
        for name, expected in sums.items():
            shard = self._shard_of[name]
            found = xxhash.xxh3_128()
            position, left = shard.offsets[name], shard.tensors[name].nbytes
            while left:
                data = self._files[shard.filename].read(min(left, 1 << 24), position)
                found.update(data)
                position, left = position + len(data), left - len(data)
            if found.hexdigest() != expected:
                return False
        return True


def take_lock(work: Path, out: Path) -> int:
    """Lock a hidden folder for this process, until the descriptor is closed or the process ends.

    raises: UnfinishedWork where another process has it
    """
    lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UnfinishedWork(f"{out}: another wtool is writing it now") from None
    return lock


def work_folder(out: Path) -> Path:
    """The hidden folder beside an output that holds it while it is being written.

    raises: UsageError where the output is the address of an object store, which is no folder
    """
    for place, part in enumerate(out.parts):
        if SCHEME.fullmatch(part) and not Path(*out.parts[: place + 1]).is_dir():
            raise UsageError(
                f"{'/'.join(out.parts[place:])}: an address, not a folder; tensors are written at their offsets and "
                "the result is renamed, which object stores cannot do: mount it, or copy the finished folder"
            )
    return out.parent / f".{out.name}.wtool"


def is_complete(out: Path, fingerprint: str) -> bool:
    """Whether the output is there already, made by the same work; clears away what a stop at the very end left."""
    manifest = out / MANIFEST
    try:
        same = json.loads(manifest.read_bytes()).get("fingerprint") == fingerprint
    except (OSError, ValueError, AttributeError):
        return False
    work = work_folder(out)
    entries = _read_journal(work / "journal") if same else []
    if entries and entries[0].get("fingerprint") == fingerprint and not (work / "output").exists():
        shutil.rmtree(work)
    return same


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn the system's errors into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                f"{out}: no room left on the disk; what is done is kept, free some and run the same command again"
            ) from None
        raise OutputError(f"{error.filename or out}: cannot be written: {error.strerror}") from None


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's whole lines; a line cut short by a stop is passed over."""
    entries: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            try:
                entries.append(cast(dict[str, Any], json.loads(line)))
            except ValueError:
                continue
    return entries


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.is_file() else 0


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
