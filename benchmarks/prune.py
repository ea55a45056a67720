"""wtool's pruning against llm-compressor, optipfair and mergekit: what is left of the model, masks, time and memory.

    python benchmarks/prune.py MODEL TEXT.txt... --calib IDS.jsonl --llmcompressor PYTHON --optipfair PYTHON
        --mergekit PYTHON [--only sparse,parity,speed,depth,width] [--cases REGEX] [--folder bench-prune]
        [--json RESULTS]
    python benchmarks/prune.py --tables RESULTS

Each PYTHON is the interpreter of an environment that holds that tool; a tool without one is left out. Every pruning is
a whole process, one after the other; memory is its highest resident set less that of a process which only imports what
the tool does. A result that RESULTS has is not made again, so a stopped run goes on by the same command; outputs stay
in the folder. Quality is measured on held-out texts by `prune_peers/evaluate.py`, for all tools alike.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prune_peers.cases import PARTS, PEERS, Bench, Case
from prune_peers.tables import print_tables
from quantize import WTOOL_IMPORTS, Tool, measure, surroundings

PACKAGES = {
    "wtool": ("torch", "transformers", "safetensors"),
    "llmcompressor": ("llmcompressor", "torch", "transformers", "compressed-tensors"),
    "optipfair": ("optipfair", "torch", "transformers"),
    "mergekit": ("mergekit", "torch", "transformers"),
}


def run_part(part: str, bench: Bench, record: dict[str, Any]) -> None:
    """Run what the record lacks of a part, and measure what is left of the model."""
    wanted = re.compile(bench.cases)
    cases = [case for case in PARTS[part](bench) if case.tool in bench.pythons and wanted.search(case.name)]
    made = [case for case in cases if case.name in record["runs"] or _run(case, bench, record)]
    if part == "parity":
        _compare(made, "parity-wtool_", "parity-llmcompressor_", bench, record)
    if part == "depth":
        _compare(made, "depth-perplexity-", "depth-mergekit_passthrough-", bench, record)
    if part in ("sparse", "depth", "width"):
        _evaluate(made, bench, record)


def _run(case: Case, bench: Bench, record: dict[str, Any]) -> bool:
    """Run a case and store what it took; False where it failed, so that the others go on."""
    out = bench.out(case.name)
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_name(f"{case.name}.log")
    try:
        usage = measure([bench.pythons[case.tool], *case.command], log)
    except SystemExit as failure:
        print(failure, file=sys.stderr, flush=True)
        return False
    commit = record["surroundings"]["commit"]
    record["runs"][case.name] = {"tool": case.tool, "commit": commit, **asdict(usage), **_told(case, out, log)}
    bench.save(record)
    print(f"{case.name:44} {usage.seconds:7.1f} s", flush=True)
    return True


def _told(case: Case, out: Path, log: Path) -> dict[str, Any]:
    """What a process says of itself: the last line of a peer's, the layers that wtool kept."""
    if case.tool == "wtool" and case.name.startswith("depth-"):
        return {"layers": json.loads((out / "wtool.json").read_text())["recipe"]["kept"]["layers"]}
    last = log.read_text(errors="replace").splitlines()[-1]
    return {"figures": json.loads(last)} if last.startswith("{") else {}


def _compare(cases: list[Case], ours: str, theirs: str, bench: Bench, record: dict[str, Any]) -> None:
    """Put pairs of outputs beside each other, and keep what is not equal."""
    found = record["compared"]
    names = {case.name for case in cases}
    for name in sorted(names):
        other = name.replace(ours, theirs)
        if not name.startswith(ours) or other not in names or name in found:
            continue
        command = [sys.executable, str(PEERS / "compare.py"), str(bench.out(name)), str(bench.out(other))]
        found[name] = {"with": other, **json.loads(subprocess.check_output(command))}
        bench.save(record)


def _evaluate(cases: list[Case], bench: Bench, record: dict[str, Any]) -> None:
    """Perplexity and divergence of every output that the record has not; one process holds the whole model."""
    found = record["quality"]
    missing = [case for case in cases if case.name not in found]
    if not missing:
        return
    answers = bench.folder / "quality.json"
    answers.write_text(json.dumps(found))
    texts = [str(text) for text in bench.texts]
    command = [sys.executable, str(PEERS / "evaluate.py"), str(bench.model), str(answers), *texts, "--"]
    measured = subprocess.run([*command, *(str(bench.out(case.name)) for case in missing)])
    found |= json.loads(answers.read_text())
    bench.save(record)
    if measured.returncode:
        raise SystemExit(f"{PEERS / 'evaluate.py'} failed with {measured.returncode}")


def _tools(pythons: dict[str, str]) -> list[Tool]:
    """The tools as `quantize.py` knows them, for their versions and imports."""
    scripts = {name: (str(PEERS / f"run_{name}.py"),) for name in pythons} | {"wtool": ("-c", WTOOL_IMPORTS)}
    return [Tool(name, python, (), scripts[name], PACKAGES[name]) for name, python in pythons.items()]


def around(bench: Bench) -> dict[str, Any]:
    """Where and with what, and the names of the inputs: their paths are nobody else's business."""
    found = surroundings(_tools(bench.pythons))
    names = {"model": bench.model.name, "texts": [text.stem for text in bench.texts], "calib": bench.calib.name}
    return {**found, "command": names}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--calib", type=Path, help="rows of token ids (JSONL)")
    for name in PACKAGES.keys() - {"wtool"}:
        parser.add_argument(f"--{name}", metavar="PYTHON")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--cases", default="", metavar="REGEX", help="of the parts, the cases whose names it fits")
    parser.add_argument("--folder", type=Path, default=Path("bench-prune"), help="for outputs and logs")
    parser.add_argument("--json", type=Path, default=Path("prune.json"), help="where results are, and go")
    parser.add_argument("--tables", type=Path, metavar="RESULTS", help="print results as markdown, and do nothing else")
    given = parser.parse_args()
    if not given.tables and not (given.model and given.texts and given.calib):
        parser.error("give a model, held-out texts and --calib")
    if unknown := {*given.only.split(",")} - PARTS.keys():
        parser.error(f"--only: no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return given


def main() -> None:
    given = arguments()
    if given.tables:
        print_tables(json.loads(given.tables.read_text()))
        return
    found = {name: sys.executable if name == "wtool" else getattr(given, name) for name in PACKAGES}
    pythons = {name: python for name, python in found.items() if python}
    given.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.model, tuple(given.texts), given.calib, given.folder, given.json, pythons, given.cases)
    record = {"imports": {}, "runs": {}, "compared": {}, "quality": {}}
    record |= json.loads(bench.results.read_text()) if bench.results.exists() else {}
    record["surroundings"] = around(bench)
    for tool in _tools(pythons):
        if tool.name not in record["imports"]:
            usage = measure([tool.python, *tool.imports], bench.folder / "imports.log")
            record["imports"][tool.name] = asdict(usage)
    for part in given.only.split(","):
        run_part(part, bench, record)
    print_tables(record)


if __name__ == "__main__":
    main()
