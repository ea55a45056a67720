"""What a person sees: results on stdout, progress and remarks on stderr, JSON for scripts.

rich is imported where something is drawn, so that a command's --help does not wait for it. What happens inside is
told by the logger `wtool` and those below it, on stderr, when --verbose or WTOOL_LOG asks for it.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any

from wtool.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

LEVELS = ("debug", "info", "warning")
log = logging.getLogger("wtool")
WIDTH_OF_FIGURES = 110  # characters of a line of progress
_displays: list[Callable[[str], None]] = []  # of this process, the one that is shown last
json_told = 0  # objects that this process has printed for scripts


def emit_json(result: Mapping[str, Any]) -> None:
    """Print a result for scripts: one JSON object on stdout; NaN and infinity, which JSON has not, become null."""
    global json_told
    print(json.dumps(_without_nonfinite(result), indent=2, ensure_ascii=False, allow_nan=False))
    json_told += 1


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
    """Show how far a long work is: units done, rate, time left, memory; nothing where stderr is not a terminal.

    label: the stage of the work
    total: in units
    yields: a function that is told how many units more are done; any thread may call it
    """
    if quiet or not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    columns = _columns(unit, 24 if console.width > 90 else 10, console.width - WIDTH_OF_FIGURES)
    shown = Progress(*columns, console=console, speed_estimate_period=300)
    with shown:
        task = shown.add_task(label, total=total, place="")
        _displays.append(lambda place: shown.update(task, place=place))
        try:
            yield lambda amount: shown.advance(task, amount)
        finally:
            _displays.pop()


def working_on(place: str) -> None:
    """Tell the display, where one is shown, which layer or tensor it is that is worked on; any thread may."""
    if _displays:
        _displays[-1](place)


def _columns(unit: str, bar: int, room: int) -> "list[ProgressColumn]":
    """What a line of progress shows.

    bar:  its width in characters
    room: characters for what is worked on; it is left out where they are few
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.3g} {unit}/s" if task.speed else "")

    class Memory(ProgressColumn):
        max_refresh = 1.0  # seconds

        def render(self, task: Task) -> Text:
            return Text(memory_line())

    amount = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn(), Rate()]
    held = Memory(table_column=Column(no_wrap=True))
    place = Column(no_wrap=True, overflow="ellipsis", max_width=room)
    at = [TextColumn("{task.fields[place]}", style="dim", markup=False, table_column=place)] if room >= 20 else []
    return [TextColumn("{task.description}"), BarColumn(bar), *amount, TimeRemainingColumn(), held, *at]


def memory() -> tuple[int, int] | None:
    """The process's memory in bytes: resident, and the anonymous part of it, which is no mapped file's.

    returns: None where the system does not tell
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            told = dict(line.split(":", 1) for line in file)
        resident, anonymous = (int(told[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return resident, anonymous


def memory_line() -> str:
    """The process's memory in words, and its own of it, without mapped files; empty where the system does not tell."""
    found = memory()
    return f"{human_bytes(found[0])} held, {human_bytes(found[1])} own" if found else ""


class _ToStderr(logging.Handler):
    """Writes to what sys.stderr is at the time, which a progress display may have taken over."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def log_shown(level: str | None) -> Iterator[None]:
    """Show what the logger `wtool` tells, from a level on; None leaves logging as it is.

    raises: UsageError
    """
    if not level:
        yield
        return
    if level.lower() not in LEVELS:
        raise UsageError(f"WTOOL_LOG is '{level}'; there are {', '.join(LEVELS)}")
    handler, before = _ToStderr(), (log.level, log.propagate)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(level.upper())
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


@contextmanager
def log_whole(verb: str) -> Iterator[None]:
    """Log what a command took."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s ended after %.1f s; memory: %s", verb, time.perf_counter() - begin, memory_line())


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
