"""A command that ends when the process that started it ends: `python -m wtool.executors.tied PARENT COMMAND …`.

What a lost worker was doing must not go on beside the worker that takes its place. Linux sends a signal to a process
whose parent has died, if it is asked to (prctl(2), PR_SET_PDEATHSIG); the wish outlives exec. A command that this one
starts itself is not bound by it; wtool's own locks keep such apart.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # of prctl.h


def main() -> None:
    """Become the command."""
    parent, *command = sys.argv[1:]
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it has died before it could be asked for
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]}: cannot be started: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
