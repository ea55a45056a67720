"""Which jobs are to be done, and doing them in order: a failure stops what needs it, and nothing else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from wtool.errors import WtoolError

from .command import arguments, command_of, destination
from .jobs import Job
from .ledger import STOPPED, Entry, Ledger
from .process import Run
from .recipe import Pipeline


def to_do(jobs: Sequence[Job], keys: Mapping[Job, str], ledger: Ledger, wanted: set[str], redo: set[str]) -> list[Job]:
    """The jobs that are to be run: those not done as asked, and what they need that is not there any more.

    jobs:   each after those that it needs
    wanted: stages to come to; empty is all
    redo:   stages to do again, with all that needs them
    """
    needed: set[Job] = set()  # by others that are to be run
    again: set[Job] = set()
    for job in jobs:
        if job.stage in redo or any(each in again for each in job.needs):
            again.add(job)
    found: list[Job] = []
    for job in reversed(jobs):
        is_wanted = not wanted or job.stage in wanted or job in needed
        output = job.output(ledger.out)
        is_missing = job in needed and output is not None and not output.exists()
        if is_wanted and (is_missing or job in again or not ledger.is_done(job, keys[job])):
            found.append(job)
            needed.update(job.needs)
    return found[::-1]


class Schedule:
    """A run of some jobs.

    todo: each after those of them that it needs
    at_once: how many are run side by side
    """

    def __init__(
        self,
        pipeline: Pipeline,
        jobs: Sequence[Job],
        todo: Sequence[Job],
        keys: Mapping[Job, str],
        ledger: Ledger,
        *,
        at_once: int = 1,
        keep_all: bool = False,
        quiet: bool = False,
    ):
        self._pipeline, self._jobs, self._keys, self._ledger = pipeline, jobs, keys, ledger
        self._at_once, self._keep_all, self._quiet = at_once, keep_all, quiet
        self._left = list(todo)
        self.failed: dict[Job, str] = {}  # and why; those too that could not be begun

    def carry_out(self, run: Run, begins: Callable[[Job], None], ends: Callable[[Job, Entry], None]) -> None:
        """Run the jobs; what is done is in the ledger.

        run: carries out one, in any thread
        begins, ends: are told of each
        """
        running: dict[Future[Entry], Job] = {}
        with ThreadPoolExecutor(self._at_once) as pool:
            while self._left or running:
                for job in self._ready(running.values())[: self._at_once - len(running)]:
                    self._left.remove(job)
                    begins(job)
                    running[pool.submit(self._one, job, run)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, entry = running.pop(future), future.result()
                    self._end(job, entry)
                    ends(job, entry)

    def _ready(self, running: Iterable[Job]) -> list[Job]:
        """Jobs that wait for nothing; those whose needs have failed are given up."""
        for job in list(self._left):
            if broken := next((each for each in job.needs if each in self.failed), None):
                self._left.remove(job)
                self.failed[job] = f"'{broken.name}' is not there"
        waiting = {*self._left, *running}
        return [job for job in self._left if waiting.isdisjoint(job.needs)]

    def _one(self, job: Job, run: Run) -> Entry:
        """Run a job in a process of its own."""
        output = job.output(self._ledger.out)
        try:
            given = arguments(job, self._pipeline, self._folder, self._ledger.path(job, ".yml"))
        except WtoolError as error:
            return Entry(self._keys[job], 0.0, str(error))
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
        flags = self._flags(job)
        self._ledger.write(job, Entry(self._keys[job], 0.0, STOPPED))
        ended = run(job, [*given, *destination(output), *flags], self._ledger.path(job, ".log"))
        size = None if ended.error or output is None else _size(output)
        return Entry(self._keys[job], ended.seconds, ended.error, ended.peak_bytes, size, figures=ended.figures)

    def _flags(self, job: Job) -> list[str]:
        """Options of this run: what another recipe left is replaced, what was stopped goes on."""
        known = {name for parameter in command_of(job.verb).params for name in parameter.opts}
        before = self._ledger.read(job)
        is_stale = before is not None and (before.key != self._keys[job] or before.error is None)
        wished = ["--json", *(["--force"] if is_stale else []), *(["--quiet"] if self._quiet else [])]
        return [flag for flag in wished if flag in known]

    def _folder(self, job: Job) -> str:
        return str(job.output(self._ledger.out))

    def _end(self, job: Job, entry: Entry) -> None:
        self._ledger.write(job, entry)
        if entry.error is not None:
            self.failed[job] = entry.error
        if not self._keep_all:
            self._drop_what_is_not_needed()

    def _drop_what_is_not_needed(self) -> None:
        for job in self._jobs:
            users = [each for each in self._jobs if job in each.needs]
            if not job.asked.keep and users and all(self._ledger.is_done(each, self._keys[each]) for each in users):
                self._ledger.drop(job)


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in (path.iterdir() if path.is_dir() else [path]) if each.is_file())
