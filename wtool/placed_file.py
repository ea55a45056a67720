"""A file of known size whose parts are written in any order, from any thread, past the page cache where that works.

Writing many gigabytes through the page cache costs the processor a copy and a page for every 4 KiB, and pushes out
the very inputs that are being read. Direct writes cost neither, and are on the device when they return. They must be
aligned in the file and in memory, so data is put together in a small buffer that has pages as the file has, and the
ragged ends of a part, which share a page with its neighbours, go through the cache as usual. Where the file system
knows no direct writes, everything does.
"""

import mmap
import os
import threading
from concurrent.futures import Executor, Future, wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 4096  # bytes; a multiple of every device's block
BUFFER = (1 << 22) + ALIGNMENT  # bytes, two for each thread
SMALL = 1 << 16  # bytes; below, the cache is as good
_MAX_WRITE = 1 << 30  # bytes; one call writes at most 2 GiB

_local = threading.local()


class PlacedFile:
    """Opened, and created if need be, with its full size.

    disk: where direct writes wait for the device
    """

    def __init__(self, path: Path, size: int, disk: Executor):
        self._disk = disk
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, size)
        try:
            self._direct: int | None = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except (OSError, AttributeError):  # the file system, or the system, knows no direct writes
            self._direct = None

    def place(self, position: int, size: int) -> "Placement":
        """Begin to write so many bytes from a position on, in their order."""
        return Placement(self._file, self._direct if size >= SMALL else None, position, self._disk)

    def read(self, size: int, position: int) -> bytes:
        """Read up to `size` bytes."""
        return os.pread(self._file, size, position)

    def sync(self) -> None:
        """Return when everything written is on the device."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)


class Placement:
    """Bytes on their way to their place: `room` for those that come next, `end` when all are there.

    A thread fills one at a time, and uses its two buffers in turn: one is filled while the other is written. So after
    `end` it may go on with the next, and `wait` for this one later.
    """

    def __init__(self, file: int, direct: int | None, position: int, disk: Executor):
        self._file, self._direct, self._disk = file, direct, disk
        self._filling, self._other = _buffers()
        self._writes: list[Future[None]] = []
        self._origin = position // ALIGNMENT * ALIGNMENT  # in the file, of the buffer's first byte
        self._first = self._last = position - self._origin  # what is in the buffer and not in the file

    def room(self, size: int) -> NDArray[np.uint8]:
        """Memory for the next bytes, to be filled before more is asked for."""
        if self._last + size > self._filling.memory.size:
            self._put()
        if self._last + size > self._filling.memory.size:
            larger = _Buffer(self._last + size)
            larger.memory[: self._last] = self._filling.memory[: self._last]
            self._filling = larger
        begin, self._last = self._last, self._last + size
        return self._filling.memory[begin : self._last]

    def end(self) -> None:
        """Begin to write what is left."""
        self._put()
        self._through_cache(self._first, self._last)

    def wait(self) -> None:
        """Return when all is written."""
        for writing in self._writes:
            writing.result()

    def _put(self) -> None:
        """Write what is there; of direct writes a last ragged page is kept, and goes on in the other buffer."""
        if self._direct is None:
            self._through_cache(self._first, self._last)
            self._origin, self._first, self._last = self._origin + self._last, 0, 0
            return
        begin, end = -(-self._first // ALIGNMENT) * ALIGNMENT, self._last // ALIGNMENT * ALIGNMENT
        if begin >= end:
            return
        self._through_cache(self._first, begin)
        self._other.make_free()
        while self._writes and self._writes[0].done():
            self._writes.pop(0).result()
        self._other.memory[: self._last - end] = self._filling.memory[end : self._last]
        pages = self._filling.memory.data[begin:end]
        self._filling.writing = self._disk.submit(_write_all, self._direct, pages, self._origin + begin)
        self._writes.append(self._filling.writing)
        self._filling, self._other = self._other, self._filling
        self._origin, self._first, self._last = self._origin + end, 0, self._last - end

    def _through_cache(self, begin: int, end: int) -> None:
        _write_all(self._file, self._filling.memory.data[begin:end], self._origin + begin)


class _Buffer:
    """Memory that has pages as a file has, and the writing of it that is under way."""

    def __init__(self, size: int):
        self.memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        self.writing: Future[None] | None = None

    def make_free(self) -> None:
        """Return when the memory is written, or cannot be."""
        if self.writing is not None:
            wait([self.writing])
            self.writing = None


def _buffers() -> tuple[_Buffer, _Buffer]:
    """The thread's, of which the first is free."""
    if not hasattr(_local, "buffers"):
        _local.buffers = _Buffer(BUFFER), _Buffer(BUFFER)
    one, other = sorted(_local.buffers, key=lambda buffer: buffer.writing is not None)
    one.make_free()
    return one, other


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data[:_MAX_WRITE], position)
        data, position = data[written:], position + written
