"""What the benchmark of distillation runs: a case is one process that writes one folder.

The parts are generators of cases. A case that trains ends with its student's name, so results of several students go
into one file; a teacher's cache serves all of them.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

PEERS = Path(__file__).parent
LOSSES = {
    "forward_kl": ("--loss", "forward-kl"),
    "reverse_kl": ("--loss", "reverse-kl"),
    "jsd": ("--loss", "jsd"),
    "skew_kl": ("--loss", "skew-kl"),
    "skew_reverse_kl": ("--loss", "skew-reverse-kl"),
    "cross_entropy": ("--kd", "0", "--ce", "1"),
    "forward_kl_and_0.3_cross_entropy": ("--loss", "forward-kl", "--ce", "0.3"),
}
KEPT = (("top-k", 8), ("top-k", 32), ("top-k", 128), ("sample", 32))  # of each distribution in a cache
MODULE = ("-m", "wtool")
# How wtool and TRL are compared: the options of each. TRL computes activations again by default.
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"wtool": (), "trl": ()},
    "+checkpointing": {"wtool": ("--checkpointing",), "trl": ("--checkpointing",)},
    "+mixed": {"wtool": ("--precision", "mixed"), "trl": ("--bf16",)},
}


@dataclass(frozen=True)
class Case:
    """One process, and the folder that it writes."""

    name: str
    tool: str
    command: tuple[str, ...]  # arguments of the tool's python
    judged: bool = True  # whether the folder holds a student whose quality is to be measured


@dataclass(frozen=True)
class Settings:
    """What results depend on beside the inputs."""

    steps: int  # of the parts losses and cache
    batch: int  # windows a step
    seqlen: int  # tokens a window
    held_out: int  # windows by which wtool itself judges
    evaluate_every: int  # steps
    lr: float
    schedule: str
    precision: str  # but for the part trl
    trl_steps: int
    trl_turns: int  # of each tool; the faster one counts
    kill_steps: int

    @property
    def windows(self) -> int:
        """That the parts losses and cache read."""
        return self.steps * self.batch + self.held_out

    @property
    def windows_beside_trl(self) -> int:
        return self.trl_steps * self.batch + 1  # one to judge by


@dataclass(frozen=True)
class Bench:
    """What the benchmark was asked."""

    teacher: Path
    students: tuple[Path, ...]
    texts: tuple[Path, ...]  # held out
    settings: Settings
    folder: Path
    pythons: dict[str, str]  # of the tools that there are

    def out(self, name: str) -> Path:
        return self.folder / name

    def work(self, name: str) -> Path:
        """Where wtool keeps a folder that is not ready."""
        return self.folder / f".{name}.wtool"

    def clear(self, name: str) -> None:
        """Remove what there is of a folder, so that nothing is continued."""
        for path in (self.out(name), self.work(name), self.folder / f"{name}.training"):
            shutil.rmtree(path, ignore_errors=True)

    def rows(self, name: str, first: int, end: int) -> Path:
        """A file of some of the windows of text, all of which a tool is to read."""
        path = self.out(f"{name}.jsonl")
        lines = self.out("windows.jsonl").read_text().splitlines(keepends=True)
        if len(lines) < end:
            raise SystemExit(f"{self.out('windows.jsonl')}: has {len(lines)} windows, {end} are needed; remove it")
        path.write_text("".join(lines[first:end]))
        return path

    def in_float32(self, student: Path) -> Path:
        """A copy of a student whose weights are stored in float32."""
        out = self.out(f"{student.name}-float32")
        if not out.exists():
            script = PEERS.parent / "prune_peers" / "as_float32.py"
            subprocess.run([sys.executable, str(script), str(student), str(out)], check=True)
        return out

    def distill(
        self, name: str, student: Path, *options: str, teacher: Path | None = None, start: tuple[str, ...] = ()
    ) -> Case:
        """A case of `wtool distill`; `start` is another way to start it than as a module."""
        full_name = f"{name}-{student.name}"
        verb = (*(start or MODULE), "distill", str(teacher or self.teacher), str(student))
        precision = () if "--precision" in options else ("--precision", self.settings.precision)
        end = ("--device", "cpu", "-o", str(self.out(full_name)), "--json", "--quiet")
        return Case(full_name, "wtool", (*verb, *options, *precision, *end))

    @property
    def length(self) -> tuple[str, ...]:
        """How long the parts losses and cache train, and how they are judged meanwhile."""
        asked = self.settings
        given = {
            "--steps": asked.steps,
            "--batch": asked.batch,
            "--held-out": asked.held_out,
            "--evaluate-every": asked.evaluate_every,
            "--lr": asked.lr,
            "--schedule": asked.schedule,
        }
        return tuple(str(part) for pair in given.items() for part in pair)

    @property
    def text(self) -> tuple[str, ...]:
        """The windows that the parts losses and cache learn from."""
        count = self.settings.windows
        data = self.rows("windows-of-losses", 0, count)
        return ("--data", str(data), "--samples", str(count), "--seqlen", str(self.settings.seqlen))


def losses(bench: Bench) -> Iterator[Case]:
    """Every loss on the first student."""
    for name, options in LOSSES.items():
        yield bench.distill(f"losses-{name}", bench.students[0], *bench.text, *bench.length, *options)


def cache(bench: Bench) -> Iterator[Case]:
    """The teacher online, and caches of what it said, with the mass of the other tokens and without."""
    student = bench.students[0]
    yield bench.distill("losses-forward_kl", student, *bench.text, *bench.length, *LOSSES["forward_kl"])
    for mode, k in KEPT:
        name = f"signals-{mode}_{k}"
        listen = (*MODULE, "teacher-cache", str(bench.teacher), "--mode", mode, "--top-k", str(k), *bench.text)
        yield Case(name, "wtool", (*listen, "--device", "cpu", "-o", str(bench.out(name)), "--json", "--quiet"), False)
    without = (str(PEERS / "without_tail.py"),)
    for mode, k in KEPT:
        signals = bench.out(f"signals-{mode}_{k}")
        yield bench.distill(f"cache-{mode}_{k}", student, *bench.length, teacher=signals)
        if mode == "top-k":
            yield bench.distill(f"cache-no_tail_{k}", student, *bench.length, teacher=signals, start=without)


def trl(bench: Bench) -> Iterator[Case]:
    """wtool and TRL in turn on the last student: the same windows, order, optimizer, precision and judging.

    wtool stores a student in the type it came in, TRL in the one it was trained in, so it comes in float32.
    """
    student, asked = bench.in_float32(bench.students[-1]), bench.settings
    count = asked.windows_beside_trl
    data, held = bench.rows("windows-of-trl", 0, count - 1), bench.rows("held-of-trl", count - 1, count)
    steps, batch, lr = str(asked.trl_steps), str(asked.batch), str(asked.lr)
    text = ("--data", str(data), "--samples", str(count - 1), "--seqlen", str(asked.seqlen), "--eval-data", str(held))
    how = ("--held-out", "1", "--steps", steps, "--batch", batch, "--evaluate-every", steps)
    rate = ("--lr", lr, "--schedule", "constant", "--warmup", "0")
    for turn, way, tool in product(range(1, asked.trl_turns + 1), WAYS, ("trl", "wtool")):
        name = f"trl-{tool}{way}-{turn}"
        if tool == "wtool":
            precision = () if "mixed" in way else ("--precision", "float32")
            yield bench.distill(name, student, *text, *how, *rate, *precision, *WAYS[way][tool])
        else:
            out = bench.out(f"{name}-{student.name}")
            places = (str(bench.teacher), str(student), str(out), str(data), str(held))
            yield Case(out.name, "trl", (str(PEERS / "run_trl.py"), *places, steps, batch, lr, *WAYS[way][tool]))


PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {"losses": losses, "cache": cache, "trl": trl}
