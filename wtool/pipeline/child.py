"""A job's process: the command `wtool`, which tells its peak of memory when it ends."""

import atexit
import os

TELL_TO = "WTOOL_TELL_PEAK_TO"  # a pipe's descriptor


def tell_peak_at_the_end() -> None:
    """Write the highest resident memory (kB) of this process into a pipe when it ends.

    What the system tells a parent of its child counts the memory that the parent had when it began the child.
    """
    descriptor = os.environ.pop(TELL_TO, None)
    if descriptor is not None:
        atexit.register(lambda: os.write(int(descriptor), _peak()))


def _peak() -> bytes:
    try:
        with open("/proc/self/status", "rb") as file:
            return next(line.split()[1] for line in file if line.startswith(b"VmHWM:"))
    except (OSError, StopIteration, IndexError):
        return b""


if __name__ == "__main__":
    tell_peak_at_the_end()
    from wtool.cli import main

    main()
