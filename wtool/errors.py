"""Every error a user can meet, as a tree. Each is one line: what, where, what was found, what would be right.

    WtoolError                    exit code
    ├── UsageError                2   what was asked cannot be meant (flag, recipe, reference)
    ├── InputError                3   an input is not what it must be
    │   ├── MalformedFile             a file's bytes are not what its format says
    │   ├── MissingInput              a file, a folder, a Hub repository or a tensor is not there
    │   ├── QuantizedInput            packed weights that no decoder here reads yet
    │   └── Mismatch                  inputs that cannot be worked on together
    ├── OutputError               4   the output cannot be written
    │   ├── OutputExists              something is there already
    │   ├── UnfinishedWork            another recipe's half-done work is there
    │   └── DiskFull                  no room; what was done can be continued
    └── RuntimeProblem            5   the work itself failed (a value that is not finite, a missing optional package)

Anything that is not a WtoolError is a bug of ours and shows its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class WtoolError(Exception):
    """Base of all errors a user can meet; its text is one line."""

    exit_code = 1


class UsageError(WtoolError):
    """What was asked cannot be meant."""

    exit_code = 2


class InputError(WtoolError):
    """An input is not what it must be."""

    exit_code = 3


class MalformedFile(InputError):
    """A file's bytes are not what its format says."""


class MissingInput(InputError):
    """A file, a folder, a Hub repository or a tensor is not there."""


class QuantizedInput(InputError):
    """Packed weights that must not be taken for plain ones."""


class Mismatch(InputError):
    """Inputs that cannot be worked on together."""


class OutputError(WtoolError):
    """The output cannot be written."""

    exit_code = 4


class OutputExists(OutputError):
    """Something is at the output's place already."""


class UnfinishedWork(OutputError):
    """Half-done work of another recipe, or of a running process, is at the output's place."""


class DiskFull(OutputError):
    """No room on the device; the work done so far can be continued."""


class RuntimeProblem(WtoolError):
    """The work itself failed."""

    exit_code = 5


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known word nearest to `word`, or an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
