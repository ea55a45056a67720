"""wtool's GPTQ against llm-compressor, GPTQModel and auto-round: time, memory, and what is left of the model.

    python benchmarks/quantize_peers/texts.py MODEL SHAKESPEARE TEXTS     # once
    python benchmarks/quantize.py MODEL TEXTS --llmcompressor PYTHON --gptqmodel PYTHON [--autoround PYTHON]
        [--methods wtool,wtool-signround,autoround] [--iters 50] [--batch 4] [--samples 32] [--bits 4,3]
        [--groups 64,32] [--seeds 0] [--folder bench-quantize] [--json RESULTS]

Each PYTHON is the interpreter of an environment that holds that tool; a tool without one is left out. All quantize the
same checkpoint from the same calibration tokens, as whole processes, one after the other. Memory is a process's highest
resident set less that of a process which only imports what the tool does; "anonymous" leaves out mapped files. Quality
is the divergence from the full model on held-out texts with the quantized linears alone replaced, decoded by this
benchmark and not by any tool. The floor is two forwards and the Gram matrices, in plain torch.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

PEERS = Path(__file__).parent / "quantize_peers"
WTOOL = (
    "-m wtool quantize {model} --method gptq --bits {bits} --group-size {group} "
    "--calib {ids} --samples {samples} --seqlen 512 -o {out} --json"
)
SIGNROUND = WTOOL.replace("gptq", "signround") + " --iters {iters} --batch {batch}"
WTOOL_IMPORTS = (  # transformers' own modules are loaded when they are asked for, so the one that costs is named
    "import torch, safetensors.torch, accelerate, transformers.modeling_utils; "
    "from transformers import AutoModelForCausalLM, AutoTokenizer"
)
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


@dataclass(frozen=True)
class Tool:
    """How one tool is started."""

    name: str
    python: str
    command: tuple[str, ...]  # arguments of python, with {model} {out} {ids} {bits} {group}
    imports: tuple[str, ...]  # arguments for a process that does nothing else
    packages: tuple[str, ...]  # whose versions are stored


@dataclass(frozen=True)
class Usage:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int  # resident
    peak_anonymous_bytes: int


@dataclass(frozen=True)
class Case:
    """One quantization that every tool does."""

    bits: int
    group: int
    seed: int  # of the calibration windows

    def __str__(self) -> str:
        return f"b{self.bits}-g{self.group}-s{self.seed}"


def tools(arguments: argparse.Namespace) -> list[Tool]:
    """wtool, the floor, and the peers that have an interpreter."""
    own = (sys.executable, tuple(WTOOL.split()), ("-c", WTOOL_IMPORTS), ("torch", "transformers", "safetensors"))
    learned = (own[0], tuple(SIGNROUND.split()), *own[2:])
    as_llmcompressor = (own[0], (*own[1], "--no-sequential"), *own[2:])  # a block's Gram matrices in one forward
    gptaq = (own[0], tuple(WTOOL.replace("gptq", "gptaq").split()), *own[2:])
    found = [Tool("wtool", *own), Tool("wtool-onepass", *as_llmcompressor), Tool("wtool-gptaq", *gptaq)]
    found.append(Tool("wtool-signround", *learned))
    peers = [
        ("llmcompressor", arguments.llmcompressor, ("llmcompressor", "torch", "transformers", "compressed-tensors")),
        ("gptqmodel", arguments.gptqmodel, ("gptqmodel", "torch", "transformers")),
        ("autoround", arguments.autoround, ("auto-round", "torch", "transformers")),
    ]
    for name, python, packages in peers:
        if python:
            found.append(_script(name, python, f"run_{name}.py", packages))
    found.append(_script("floor", sys.executable, "floor.py", ()))
    wanted = [tool.name for tool in found] if arguments.methods is None else arguments.methods.split(",")
    if unknown := set(wanted) - {tool.name for tool in found}:
        raise SystemExit(f"--methods: no tool {', '.join(sorted(unknown))}; a peer needs its --NAME PYTHON")
    return [tool for tool in found if tool.name in wanted]


def _script(name: str, python: str, file: str, packages: tuple[str, ...]) -> Tool:
    script = str(PEERS / file)
    places = ["{model}", "{out}", "{ids}", "{bits}", "{group}"]
    places += ["{iters}", "{batch}"] if name == "autoround" else []
    return Tool(name, python, (script, *places), (script,), packages)


def measure(command: list[str], log: Path) -> Usage:
    """Run a command to its end, what it says going into a file."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
    highest = {"VmHWM": 0, "RssAnon": 0}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, highest, ended))
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}; what it said is in {log}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, highest["VmHWM"], highest["RssAnon"])


def _environment() -> dict[str, str]:
    return {"THREADS": str(os.cpu_count()), **os.environ, "HF_HUB_OFFLINE": "1"}


def _watch(pid: int, highest: dict[str, int], ended: threading.Event) -> None:
    """Keep the highest of some lines of a process's status, in bytes."""
    while not ended.wait(0.01):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        for field, _, value in (line.partition(":") for line in lines):
            if field in highest:
                highest[field] = max(highest[field], 1024 * int(value.split()[0]))


def run_case(
    case: Case, tools: list[Tool], model: Path, texts: Path, folder: Path, repeat: int, numbers: dict[str, int]
) -> dict[str, Usage]:
    """Every tool's best of some runs, in turn; the outputs stay in the folder.

    numbers: samples, and the iters and batch of learned rounding
    """
    best: dict[str, Usage] = {}
    for _, tool in product(range(repeat), tools):
        out = folder / f"{tool.name}-{case}"
        shutil.rmtree(out, ignore_errors=True)
        ids = _first(texts / f"calib-s{case.seed}.jsonl", numbers["samples"], folder)
        places = {"model": model, "out": out, "ids": ids, "bits": case.bits, "group": case.group, **numbers}
        command = [tool.python, *(part.format(**places) for part in tool.command)]
        usage = measure(command, out.with_suffix(".log"))
        best[tool.name] = min(usage, best.get(tool.name, usage), key=lambda u: u.seconds)
    return best


def _first(ids: Path, samples: int, folder: Path) -> Path:
    """The first rows of a file, as a file: all tools are to see the same."""
    part = folder / f"{ids.stem}-{samples}.jsonl"
    part.write_text("".join(ids.read_text().splitlines(keepends=True)[:samples]))
    return part


def evaluate(cases: list[Case], tools: list[Tool], model: Path, texts: Path, folder: Path) -> dict[str, dict]:
    """Divergence and perplexity of every output and of rounding, {name: {text: {"kl": ..., "ppl": ...}}}."""
    results = folder / "quality.json"
    results.unlink(missing_ok=True)
    outputs = [str(folder / f"{tool.name}-{case}") for case in cases for tool in tools if tool.name != "floor"]
    rounded = sorted({f"rtn:{case.bits}:{case.group}" for case in cases})
    command = [sys.executable, str(PEERS / "evaluate.py"), str(model), str(texts / "held"), str(results)]
    subprocess.run([*command, "full", *rounded, *outputs], env=_environment(), check=True)
    return json.loads(results.read_text())


def print_case(case: Case, used: dict[str, Usage], imports: dict[str, Usage], quality: dict[str, dict]) -> None:
    """The table of one case, and wtool beside the best peer in every column."""
    names = [*(name for name in used if name != "floor"), f"rtn:{case.bits}:{case.group}"]
    texts = list(quality["full"])
    print(f"\n{case}: KL to the full model on each text, nats a token")
    print(f"{'':16}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}{'anonymous':>10}" + "".join(f"{t:>13}" for t in texts))
    columns: dict[str, list[float]] = {}
    for name in [*names, *(["floor"] if "floor" in used else [])]:
        row = [*spent(used[name], imports[name])] if name in used else [0.0] * 4
        row += [quality[key][text]["kl"] for key in (f"{name}-{case}", name) if key in quality for text in texts]
        columns[name] = row
        widths = [f"{row[0]:8.1f}{row[1]:8.1f}{row[2]:9.0f}{row[3]:10.0f}" if name in used else " " * 35]
        print(f"{name:16}" + "".join(widths + [f"{kl:13.4f}" for kl in row[4:]]))
    gptqs = [columns[name] for name in ("llmcompressor", "gptqmodel") if name in columns]
    if gptqs and "wtool" in columns:
        ratios = [ours / min(theirs) for ours, *theirs in zip(columns["wtool"], *gptqs, strict=True)]
        line = "".join(f"{ratio:{width}.2f}" for ratio, width in zip(ratios, [8, 8, 9, 10] + [13] * 9, strict=False))
        print(f"{'wtool / best':16}{line}")


def spent(usage: Usage, imports: Usage) -> tuple[float, float, float, float]:
    """Seconds, processor seconds, and megabytes above the imports: resident and anonymous."""
    resident = usage.peak_bytes - imports.peak_bytes
    return (
        usage.seconds,
        usage.cpu_seconds,
        resident / 1e6,
        (usage.peak_anonymous_bytes - imports.peak_anonymous_bytes) / 1e6,
    )


def surroundings(tools: list[Tool]) -> dict[str, object]:
    """Where and with what the figures were taken."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=PEERS)
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    versions = {tool.name: subprocess.check_output([tool.python, "-c", VERSIONS, *tool.packages]) for tool in tools}
    return {
        "commit": commit.stdout.strip(),
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": {
            "processors": len(os.sched_getaffinity(0)),
            "processor": processor.partition(":")[2].strip(),
            "platform": platform.platform(),
            "load before": os.getloadavg()[0],
        },
        "versions": {name: json.loads(found) for name, found in versions.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help="what quantize_peers/texts.py wrote")
    for name in ("llmcompressor", "gptqmodel", "autoround"):
        parser.add_argument(f"--{name}", metavar="PYTHON")
    parser.add_argument("--methods", help="some of the tools alone, e.g. wtool,wtool-signround,autoround")
    parser.add_argument("--iters", type=int, default=50, help="of learned rounding, ours and auto-round's")
    parser.add_argument("--batch", type=int, default=4, help="samples a step, of the same")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows, of 512 tokens")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--groups", default="64")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--repeat", type=int, default=1, help="the best of so many runs of each")
    parser.add_argument("--folder", type=Path, default=Path("bench-quantize"), help="for outputs and logs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = (map(int, listed.split(",")) for listed in (arguments.bits, arguments.groups, arguments.seeds))
    cases = [Case(*each) for each in product(*wanted)]
    every_tool = tools(arguments)
    record = surroundings(every_tool)
    places = (arguments.model, arguments.texts, arguments.folder)
    log = arguments.folder / "imports.log"
    imports = {tool.name: measure([tool.python, *tool.imports], log) for tool in every_tool}
    numbers = {name: getattr(arguments, name) for name in ("samples", "iters", "batch")}
    used = {case: run_case(case, every_tool, *places, arguments.repeat, numbers) for case in cases}
    quality = evaluate(cases, every_tool, *places)
    for case in cases:
        print_case(case, used[case], imports, quality)
    record["imports"] = {name: asdict(usage) for name, usage in imports.items()}
    record["runs"] = {f"{name}-{case}": asdict(usage) for case in cases for name, usage in used[case].items()}
    record["quality"] = quality
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
