"""What a person sees: results on stdout, progress and remarks on stderr, JSON for scripts.

rich is imported where something is drawn, so that a command's --help does not wait for it.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any


def emit_json(result: Mapping[str, Any]) -> None:
    """Print a result for scripts: one JSON object on stdout; NaN and infinity, which JSON has not, become null."""
    print(json.dumps(_without_nonfinite(result), indent=2, ensure_ascii=False, allow_nan=False))


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(entry) for entry in value]
    return value


def emit(text: str) -> None:
    """Print a result for people on stdout."""
    print(text)


def remark(text: str) -> None:
    """Say something on stderr that is no result."""
    print(text, file=sys.stderr)


def warn(text: str) -> None:
    """Say something on stderr that the user should know."""
    print(f"warning: {text}", file=sys.stderr)


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None = None) -> None:
    """Draw a table on stdout: the first column is names, the others are figures.

    best: the row to set in bold
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="right" if number else "left", overflow="fold")
    for number, row in enumerate(rows):
        drawn.add_row(*(Text(cell) for cell in row), style="bold" if number == best else None)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(drawn)


@contextmanager
def progress(label: str, total: int, *, quiet: bool = False, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """Show how far a long work is, with its rate and the time left; nothing where stderr is not a terminal.

    total: in units
    yields: a function that is told how many units more are done; any thread may call it
    """
    if quiet or not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn(), console=Console(stderr=True)
    )
    with shown:
        task = shown.add_task(label, total=total)
        yield lambda amount: shown.advance(task, amount)


def human_bytes(count: float) -> str:
    """12,345,678 -> 12.3 MB (decimal units, as disks and the Hub count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_count(count: float) -> str:
    """134,515,008 -> 134.5 M."""
    for unit in ("", " k", " M", " B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f} T"


def parse_size(text: str) -> int:
    """`5GB`, `500 MB`, `2GiB` or a number of bytes."""
    from wtool.errors import UsageError

    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units |= {letter: 1000**power, f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    digits = text.strip().upper().rstrip("KMGTIB ")
    unit = text.strip().upper()[len(digits) :].strip()
    try:
        size = int(float(digits) * units[unit])
    except (KeyError, ValueError):
        raise UsageError(f"'{text}' is not a size; write it like 5GB, 500MB or 2GiB") from None
    if size <= 0:
        raise UsageError(f"'{text}' is not a size: it must be more than 0")
    return size
