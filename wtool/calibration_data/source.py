"""What the user asked to calibrate on, and from each reference to its documents."""

from dataclasses import dataclass
from pathlib import Path

from wtool.calibration_data.builtin import builtin
from wtool.calibration_data.files import JSON_SUFFIXES, open_file
from wtool.calibration_data.hub import BUILDERS, ID, PER_TOKEN, is_dataset, open_dataset
from wtool.calibration_data.rows import Rows
from wtool.errors import MissingInput, UsageError, did_you_mean

SUFFIXES = (".txt", ".md", *JSON_SUFFIXES, *BUILDERS)  # what has one is a file, not a dataset of the Hub
POOL = 1 << 20  # tokens to choose windows from, if there are as many


@dataclass(frozen=True)
class CalibrationSource:
    """What to calibrate on.

    raises: UsageError where the figures make no sense
    """

    references: tuple[str, ...] = ()  # files, folders, datasets on the Hub; none is the text that Python carries
    samples: int = 128  # windows, at least 1
    length: int = 2048  # tokens of a window, at least 2
    seed: int = 0  # another seed, other windows
    text_column: str | None = None  # the key or column to take, where it is none of the known ones
    split: str = "train"  # of a dataset
    assistant_only: bool = False  # tell which tokens of conversations the assistant says

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"{self.samples} calibration windows: at least 1 is needed")
        if self.length < 2:
            raise UsageError(f"calibration windows of {self.length} tokens: at least 2 are needed")

    def pool(self, length: int) -> int:
        """How many tokens of text to choose windows of `length` from."""
        return max(POOL, 2 * self.samples * length)


def open_rows(source: CalibrationSource) -> list[Rows]:
    """The documents of each reference.

    raises: InputError, RuntimeProblem
    """
    if not source.references:
        return [builtin()]
    return [_open(reference, source) for reference in source.references]


def _open(reference: str, source: CalibrationSource) -> Rows:
    path = Path(reference).expanduser()
    if path.is_file() and not is_dataset(path):
        return open_file(path, reference, source.text_column)
    if not path.exists() and not (ID.fullmatch(reference) and path.suffix.lower() not in SUFFIXES):
        raise _missing(reference, path)
    characters = PER_TOKEN * source.pool(source.length)
    return open_dataset(reference, split=source.split, column=source.text_column, characters=characters)


def _missing(reference: str, path: Path) -> MissingInput:
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, neighbours)
    return MissingInput(f"{reference}: no such text file{hint or '; a dataset of the Hub is named org/name'}")
