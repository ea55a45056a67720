"""What fine-tuning changed, tensor by tensor, before anything is written: is it changed, how far, and of which rank.

An output's header needs the ranks, and to leave out what did not change one must have looked. So there is a first
walk through both checkpoints; its findings are noted beside the output as they come, and a stopped one goes on.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wtool import __version__
from wtool.checkpoint import Checkpoint
from wtool.compare import measure
from wtool.errors import OutputExists, RuntimeProblem
from wtool.threads import available_processors, thread_pool
from wtool.writer import MANIFEST, disk_errors, take_lock, work_folder

from ..arithmetic.random_mask import mask_key
from . import svd

LEDGER = "survey"


@dataclass(frozen=True)
class Change:
    """What became of one tensor."""

    size: float  # |tuned - base|
    relative: float  # to |base|
    rank: int | None = None  # where one was asked for by energy


@dataclass(frozen=True)
class Wanted:
    """A tensor to look at."""

    base: str  # its names
    tuned: str
    transposed: bool = False
    is_matrix: bool = False  # its rank is of interest


@dataclass(frozen=True)
class ByEnergy:
    """How ranks are found."""

    energy: float  # share of |D|² to keep, in (0, 1]
    most: int | None  # the highest rank
    randomized: bool
    seed: int


def survey(
    base: Checkpoint,
    tuned: Checkpoint,
    wanted: Mapping[str, Wanted],
    by_energy: ByEnergy | None,
    out: Path,
    *,
    force: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[str, dict[str, Change]]:
    """Look at all tensors, or at those that an earlier run did not come to.

    wanted: by the name they will have
    out: the output beside which the findings are kept
    progress: is told the bytes of the base that were looked at
    returns: what tells this survey from others, and the change of each tensor
    raises: OutputExists where another work's output is there; RuntimeProblem for NaN and infinity
    """
    fingerprint = _fingerprint(base, tuned, wanted, by_energy)
    if (found := _of_output(out, fingerprint)) is not None:
        return fingerprint, {name: found.get(name, Change(0.0, 0.0)) for name in wanted}
    if out.exists() and not force:
        raise OutputExists(f"{out}: there already; --force replaces it")
    with disk_errors(out):
        work_folder(out).mkdir(parents=True, exist_ok=True)
        lock = take_lock(work_folder(out), out)
        try:
            with _Ledger(work_folder(out) / LEDGER, fingerprint) as ledger:
                _look(base, tuned, wanted, by_energy, ledger, workers or available_processors(), progress)
                return fingerprint, {name: ledger.found[name] for name in wanted}
        finally:
            os.close(lock)


def record(fingerprint: str, changes: Mapping[str, Change]) -> dict[str, Any]:
    """A survey for the manifest; what did not change is left out."""
    return {"fingerprint": fingerprint, "changes": {name: asdict(c) for name, c in changes.items() if c.size}}


def _of_output(out: Path, fingerprint: str) -> dict[str, Change] | None:
    """The changes in the manifest of an output that came of the same survey."""
    try:
        told = json.loads((out / MANIFEST).read_bytes())["survey"]
        same = told["fingerprint"] == fingerprint
        return {name: Change(**change) for name, change in told["changes"].items()} if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(base: Checkpoint, tuned: Checkpoint, wanted: Mapping[str, Wanted], by_energy: ByEnergy | None) -> str:
    identity = {
        "wtool": __version__,
        "inputs": [[asdict(file) for file in source.identity()] for source in (base, tuned)],
        "wanted": {name: asdict(each) for name, each in wanted.items()},
        "by_energy": asdict(by_energy) if by_energy else None,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class _Ledger:
    """Findings on disk, a line each; those of another survey are discarded."""

    def __init__(self, path: Path, fingerprint: str):
        self.found: dict[str, Change] = {}
        self._guard = threading.Lock()
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        if lines and lines[0] == fingerprint.encode():
            self._take(lines[1:-1])  # the last is empty, or cut short by a stop
        kept = [fingerprint.encode(), *(_line(name, change) for name, change in self.found.items())]
        path.write_bytes(b"\n".join(kept) + b"\n")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def _take(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            name, change = json.loads(line)
            self.found[name] = Change(**change)

    def note(self, name: str, change: Change) -> None:
        with self._guard:
            self.found[name] = change
            os.write(self._file, _line(name, change) + b"\n")

    def __enter__(self) -> "_Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _line(name: str, change: Change) -> bytes:
    return json.dumps([name, asdict(change)]).encode()


def _look(
    base: Checkpoint,
    tuned: Checkpoint,
    wanted: Mapping[str, Wanted],
    by_energy: ByEnergy | None,
    ledger: _Ledger,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    def work(name: str) -> None:
        each = wanted[name]
        ledger.note(name, _change(base, tuned, name, each, by_energy))
        base.forget(each.base)
        tuned.forget(each.tuned)
        progress(base.tensors[each.base].nbytes)

    progress(sum(base.tensors[wanted[name].base].nbytes for name in wanted if name in ledger.found))
    with thread_pool(workers) as pool:
        try:
            list(pool.map(work, [name for name in wanted if name not in ledger.found]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _change(base: Checkpoint, tuned: Checkpoint, name: str, each: Wanted, by_energy: ByEnergy | None) -> Change:
    original, final = base.read(each.base), tuned.read(each.tuned)
    sums = measure(original, final)
    for side, tensor, count in ((base, each.base, sums.nonfinite[0]), (tuned, each.tuned, sums.nonfinite[1])):
        if count:
            raise RuntimeProblem(f"{side.label}: tensor '{tensor}' has {count} values that are NaN or infinite")
    size, relative = sums.dd**0.5, (sums.dd / sums.aa) ** 0.5 if sums.aa else float(sums.dd > 0)
    if by_energy is None or not each.is_matrix or not size:
        return Change(size, relative)
    matrix = final.double().sub_(original)
    matrix = matrix.t() if each.transposed else matrix
    most = min(by_energy.most or min(matrix.shape), *matrix.shape)
    if by_energy.randomized:
        found = svd.randomized(matrix, most, mask_key(by_energy.seed, 0, name)).energies
    else:
        found = svd.energies(matrix)
    return Change(size, relative, min(most, svd.rank_for(found, sums.dd, by_energy.energy)))
