"""Which jobs are done: what was asked, of which inputs, and how it ended, in a file a job.

OUT/.jobs/STAGE/POINT.json      how it ended
               POINT.yml        the recipe that its verb was given
               POINT.log        what it said
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wtool import __version__
from wtool.checkpoint.made import made_as

from .jobs import Job, content_of, options_of
from .recipe import Pipeline

STOPPED = "stopped before its end"  # what a job's entry tells while it goes on


@dataclass(frozen=True)
class Entry:
    """How a job ended."""

    key: str  # tells what was asked, of which inputs
    seconds: float
    error: str | None = None
    peak_bytes: int | None = None  # of resident memory
    bytes: int | None = None  # of the output
    is_dropped: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)  # as the verb's --json tells them


class Ledger:
    """The entries of a pipeline's jobs."""

    def __init__(self, out: Path):
        self.out = out
        self._folder = out / ".jobs"

    def path(self, job: Job, suffix: str) -> Path:
        return self._folder / job.stage / f"{job.point or 'job'}{suffix}"

    def read(self, job: Job) -> Entry | None:
        """How a job ended; None where it was never begun."""
        try:
            return Entry(**json.loads(self.path(job, ".json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, job: Job, entry: Entry) -> None:
        path = self.path(job, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(entry), indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

    def is_done(self, job: Job, key: str) -> bool:
        """Whether a job has ended well, and what it made is there, or is not needed any more."""
        entry = self.read(job)
        if entry is None or entry.error is not None or entry.key != key:
            return False
        output = job.output(self.out)
        return output is None or output.exists() or entry.is_dropped

    def drop(self, job: Job) -> None:
        """Remove what a job made."""
        entry, output = self.read(job), job.output(self.out)
        if entry is not None and output is not None and output.exists():
            self.write(job, Entry(**{**asdict(entry), "is_dropped": True}))
            shutil.rmtree(output) if output.is_dir() else output.unlink()


def keys_of(jobs: Iterable[Job], pipeline: Pipeline) -> dict[Job, str]:
    """What tells each job from any other: what was asked, the files named there, and the same of all that it needs.

    jobs: each after those that it needs
    """
    keys: dict[Job, str] = {}
    for job in jobs:
        keys[job] = _key(job, pipeline, keys)
    return keys


def _key(job: Job, pipeline: Pipeline, keys: Mapping[Job, str]) -> str:
    def name(other: Job) -> str:
        return f"job:{keys[other]}"

    content, options = content_of(job, pipeline, name), options_of(job, pipeline, name)
    asked = {
        "wtool": __version__,
        "verb": job.verb,
        "content": content,
        "options": {**pipeline.options, **options},
        "files": {text: found for text in _texts([content, options]) if (found := _stamps(text))},
        "after": [keys[other] for other in job.needs],
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def _stamps(text: str) -> list[Any]:
    """What tells the state of the files that a text names: one file, a folder, or a model and its adapters."""
    return [stamp for part in text.split("+") if part and len(part) < 4096 and (stamp := _stamp(Path(part)))]


def _stamp(path: Path) -> Any:
    if path.is_file():
        stat = path.stat()
        return [path.name, stat.st_size, stat.st_mtime_ns]
    if not path.is_dir():
        return None
    files = sorted(each for each in path.iterdir() if each.is_file())
    return made_as(path, files) or [_stamp(each) for each in files]
