"""What the C library does with memory that is freed, and when the interpreter looks for garbage. Where the library is
another one than glibc, nothing of it is changed."""

import atexit
import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@contextmanager
def without_collection() -> Iterator[None]:
    """Do not look for garbage in cycles while modules are imported, nor later in what they made: hundreds of thousands
    of objects, of which none is garbage. To look takes a tenth of the time of importing torch."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # so that the end of the interpreter is an end of all objects
        if was_enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Use freed memory again instead of giving it back to the system.

    A result of some megabytes would get fresh pages from the system each time, and to fill in those costs as much
    as the arithmetic. The memory held is that of the results in flight, as before.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        library.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def give_back_large_blocks() -> None:
    """Return large blocks to the system as soon as they are freed, so that none is held between others.

    The fresh pages cost time: with blocks from 1 MB on, GPTQ of a small model has twice the page faults, takes a tenth
    longer, and a fifteenth less memory.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def give_back_freed_memory() -> None:
    """Return to the system what is free now."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
