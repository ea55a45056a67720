"""wtool against mergekit: a base and two fine-tunes in bfloat16, merged by every method that both have.

    python benchmarks/merge.py --mergekit PATH/TO/mergekit-yaml [--shape 1b] [--methods linear,ties] [--json RESULTS]

Shapes: a llama of 1.1 B parameters in four files, one with an embedding of 128,256 x 4,096, and ones of many tiny
tensors. They need up to 16 GB of disk, and memory to keep the inputs in the page cache. Both tools run as whole
processes, one after the other, with warm caches, to the moment when the output is on the disk (wtool syncs it itself,
after mergekit `sync` does); time, processor time and peak memory (anonymous: mapped input files are left out) are those
of the process. The floor is reading the inputs and writing an output of the same size, with cat. With --json what was
measured is kept, and what is there is not measured again.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import exp, log
from pathlib import Path
from typing import Any

from merge_peers.recipes import METHODS, inputs, recipe
from merge_peers.shapes import MODELS, SHAPES, make

STARTING = """
import os
from wtool.memory import without_collection

with without_collection():  # as a merge does it
    import mergekit_lite.cli, mergekit_lite.planner, wtool.executors.chosen, wtool.executors.local, wtool.console
MORE
os._exit(0)
"""
IMPORTS = STARTING.replace("MORE", "")
COMPILED = STARTING.replace("MORE", "from mergekit_lite.arithmetic import chunks; chunks.kernels()")  # but for these:
NOT_COMPILED = ("linear", "passthrough")


@dataclass(frozen=True)
class Usage:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_anonymous_bytes: int


def measure(command: list[str], environment: dict[str, str] | None = None) -> Usage:
    """Run a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *found])
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(seconds, cpu, peak * 1024)


def measure_floor(folder: Path, mergekit: str | None) -> dict[str, Usage]:
    """Reading so many inputs of a merge and writing one output; and what starting up takes."""
    files = {model: sorted(str(path) for path in (folder / model).glob("*.safetensors")) for model in MODELS}
    subprocess.run(
        ["cat", *(path for paths in files.values() for path in paths)], stdout=subprocess.DEVNULL, check=True
    )
    out = folder / "floor"
    found: dict[str, Usage] = {}
    for count in (1, 2, 3):
        read = " ".join(path for model in MODELS[:count] for path in files[model])
        copy = f"cat {read} > /dev/null; cat {' '.join(files['a'])} > {out}; sync {out}"
        found[f"read {count}, write 1"] = measure(["sh", "-c", copy])
    out.unlink()
    theirs = {"mergekit --help": measure([mergekit, "--help"], {"HF_HUB_OFFLINE": "1"})} if mergekit else {}
    return found | {
        **theirs,
        "imports": measure([sys.executable, "-c", IMPORTS]),
        "imports with numba": measure([sys.executable, "-c", COMPILED]),
        "wtool --help": measure([sys.executable, "-m", "wtool", "--help"]),
    }


def measure_method(folder: Path, method: str, mergekit: str | None) -> dict[str, Usage]:
    """One run of each tool, in turn; before them one of wtool, as a method's first use compiles its loops."""
    path, out = folder / f"{method}.yml", folder / "out"
    path.write_text(recipe(method, folder))
    tools = {"wtool": [sys.executable, "-m", "wtool", "merge", str(path), "-o", str(out), "--quiet"]}
    if mergekit:
        tools["mergekit"] = [mergekit, str(path), str(out), "--quiet"]
    found: dict[str, Usage] = {}
    measure(tools["wtool"])
    for tool, command in tools.items():
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        found[tool] = measure(command, {"HF_HUB_OFFLINE": "1"})
        begin = time.perf_counter()
        os.sync()
        found[tool] = replace(found[tool], seconds=found[tool].seconds + time.perf_counter() - begin)
    shutil.rmtree(out, ignore_errors=True)
    return found


def tell(shape: str, measured: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the table of a shape."""
    floor = measured["floor"]
    print(f"\n{shape}\n{'':24} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}")
    for name, usage in floor.items():
        print(f"{name:24} {_figures(usage)}")
    print(f"{'method':16} {'tool':9} {'wall s':>6} {'CPU s':>8} {'peak MB':>8}   wtool is; its time without imports")
    ratios: list[float] = []
    bares: list[float] = []  # without what starting up takes
    for method, tools in ((name, found) for name, found in measured.items() if name != "floor"):
        ours, theirs = tools["wtool"], tools.get("mergekit")
        imports = floor["imports" if method in NOT_COMPILED else "imports with numba"]["seconds"]
        bare = (ours["seconds"] - imports) / floor[f"read {inputs(method)}, write 1"]["seconds"]
        print(f"{method:16} wtool    {_figures(ours)}   {bare:.1f}x the floor")
        if theirs:
            ratios.append(theirs["seconds"] / ours["seconds"])
            work = (
                theirs["seconds"] - floor["mergekit --help"]["seconds"],
                ours["seconds"] - imports,
            )
            if min(work) > 0.0:  # a tiny merge is within what imports vary by
                bares.append(work[0] / work[1])
            smaller = theirs["peak_anonymous_bytes"] / ours["peak_anonymous_bytes"]
            print(f"{'':16} mergekit {_figures(theirs)}   {ratios[-1]:.1f}x faster, {smaller:.1f}x smaller")
    if ratios:
        whole, bare = (f"{exp(sum(map(log, each)) / len(each)):.1f}x" if each else "?" for each in (ratios, bares))
        print(f"geometric mean over {len(ratios)} methods: {whole} faster, {bare} without starting up")


def _figures(usage: dict[str, float]) -> str:
    return f"{usage['seconds']:8.2f} {usage['cpu_seconds']:8.2f} {usage['peak_anonymous_bytes'] / 1e6:8.0f}"


def surroundings() -> dict[str, Any]:
    """Where and with what it was measured."""
    return {
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": {"processors": len(os.sched_getaffinity(0)), "platform": platform.platform()},
        "versions": {name: version(name) for name in ("torch", "safetensors")} | {"mergekit": "0.1.5"},
        "python": platform.python_version(),
    }


def main() -> None:
    """Measure and print tables; --json keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-merge"), help="for the models and outputs")
    parser.add_argument("--mergekit", help="the mergekit-yaml program; without it only wtool is measured")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = given.folder.resolve() / given.shape
    make(SHAPES[given.shape], folder)
    kept: dict[str, Any] = json.loads(given.json.read_text()) if given.json and given.json.exists() else {"shapes": {}}
    measured = kept["shapes"].setdefault(given.shape, {})

    def keep(name: str, found: dict[str, Usage]) -> None:
        measured[name] = {key: asdict(usage) for key, usage in found.items()}
        if given.json:
            given.json.write_text(json.dumps(kept | surroundings(), indent=1) + "\n")

    if "floor" not in measured:
        keep("floor", measure_floor(folder, given.mergekit))
    for method in given.methods.split(","):
        if method not in measured:
            keep(method, measure_method(folder, method, given.mergekit))
            print(f"{method}: measured", file=sys.stderr)
    tell(given.shape, measured)


if __name__ == "__main__":
    main()
