"""A file of known size whose parts are written in any order, from any thread, past the page cache where that works.

Writing many gigabytes through the page cache costs the processor a copy and a page for every 4 KiB, and pushes out
the very inputs that are being read. Direct writes cost neither, and are on the device when they return. They must be
aligned in the file and in memory, so data goes through a small aligned buffer, and the ragged ends of a part, which
share a page with its neighbours, go through the cache as usual. Where the file system knows no direct writes,
everything does.
"""

import mmap
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 4096  # bytes; a multiple of every device's block
BUFFER = 1 << 22  # bytes, for each thread
SMALL = 1 << 16  # bytes; below, the cache is as good
_MAX_WRITE = 1 << 30  # bytes; one call writes at most 2 GiB

_local = threading.local()


class PlacedFile:
    """Opened, and created if need be, with its full size."""

    def __init__(self, path: Path, size: int):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, size)
        try:
            self._direct: int | None = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except (OSError, AttributeError):  # the file system, or the system, knows no direct writes
            self._direct = None

    def write(self, data: memoryview, position: int) -> None:
        """Put bytes at their place."""
        data = data.cast("B")
        if self._direct is None or data.nbytes < SMALL:
            _write_all(self._file, data, position)
            return
        first = -position % ALIGNMENT
        last = data.nbytes - (position + data.nbytes) % ALIGNMENT
        _write_all(self._file, data[:first], position)
        _write_all(self._file, data[last:], position + last)
        source, buffer = np.frombuffer(data, dtype=np.uint8), _aligned_buffer()
        for begin in range(first, last, BUFFER):
            size = min(BUFFER, last - begin)
            np.copyto(buffer[:size], source[begin : begin + size])
            _write_all(self._direct, buffer.data[:size], position + begin)

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


def _aligned_buffer() -> NDArray[np.uint8]:
    if not hasattr(_local, "buffer"):
        _local.buffer = np.frombuffer(mmap.mmap(-1, BUFFER), dtype=np.uint8)
    return _local.buffer


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data[:_MAX_WRITE], position)
        data, position = data[written:], position + written
