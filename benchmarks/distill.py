"""wtool's distillation: losses, caches of the teacher, TRL's GKDTrainer beside it, and kill -9.

    python benchmarks/distill.py TEACHER --students F24 F20 --data TEXT.jsonl --held TEXT.txt... [--trl PYTHON]
        [--only losses,cache,trl,kill] [--tokens 16384] [--folder bench-distill] [--json RESULTS]
    python benchmarks/distill.py --tables RESULTS

PYTHON is the interpreter of an environment that holds TRL 1.16; without one its part is left out. `losses`, `cache` and
`kill` are run on the first student, `trl` on the last one. Every training and every cache is a whole process, one after
the other; memory is its highest resident set less that of a process which only imports what the tool does. All learn
from the same windows of text. A result that RESULTS has is not made again, so a stopped benchmark goes on by the same
command; outputs stay in the folder. Quality is measured on the held-out texts by `prune_peers/evaluate.py`, for all.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill_peers import kill
from distill_peers.cases import PARTS, PEERS, Bench, Case, Settings
from distill_peers.tables import print_tables
from quantize import Tool, measure, surroundings

EVALUATE = PEERS.parent / "prune_peers" / "evaluate.py"
IMPORTS = "import torch, safetensors.torch, accelerate; from transformers import AutoModelForCausalLM, Trainer"
PACKAGES = {"wtool": ("torch", "transformers", "accelerate"), "trl": ("trl", "torch", "transformers", "accelerate")}


def run_part(part: str, bench: Bench, results: Path, record: dict[str, Any]) -> None:
    """Run what the record lacks of a part, and measure the students."""
    if part == "kill":
        record["kill"] = record.get("kill") or kill.compare(bench)
        return save(results, record)
    cases = [case for case in PARTS[part](bench) if case.tool in bench.pythons]
    made = [case for case in cases if case.name in record["runs"] or _run(case, bench, results, record)]
    _evaluate([bench.out(case.name) for case in made if case.judged], bench, results, record)


def save(results: Path, record: dict[str, Any]) -> None:
    results.write_text(json.dumps(record, indent=1) + "\n")


def _run(case: Case, bench: Bench, results: Path, record: dict[str, Any]) -> bool:
    """Run a case and store what it took and told; False where it failed, so that the others go on."""
    bench.clear(case.name)
    out = bench.out(case.name)
    log = out.with_name(f"{case.name}.log")
    try:
        usage = measure([bench.pythons[case.tool], *case.command], log)
    except SystemExit as failure:
        print(failure, file=sys.stderr, flush=True)
        return False
    shutil.rmtree(bench.folder / f"{case.name}.training", ignore_errors=True)  # TRL's state of the optimizer
    size = sum(path.stat().st_size for path in out.iterdir())
    told = {"figures": _told(log), "disk_bytes": size, "commit": record["surroundings"]["commit"]}
    record["runs"][case.name] = {"tool": case.tool, **asdict(usage), **told}
    save(results, record)
    print(f"{case.name:48} {usage.seconds:7.1f} s", flush=True)
    return True


def _told(log: Path) -> dict[str, Any]:
    """The last JSON object that a process has printed, whose first line begins with its brace; without its place."""
    text = "\n" + log.read_text(errors="replace")
    found, _ = json.JSONDecoder().raw_decode(text[text.rindex("\n{") + 1 :])
    return {key: value for key, value in found.items() if key != "output"}


def _evaluate(folders: list[Path], bench: Bench, results: Path, record: dict[str, Any]) -> None:
    """Perplexity and divergence of the students before and after; one process holds the teacher's hidden states."""
    found = record["quality"]
    missing = [folder for folder in (*bench.students, *folders) if folder.name not in found]
    if not missing:
        return
    answers = bench.out("quality.json")
    answers.write_text(json.dumps(found))
    command = [sys.executable, str(EVALUATE), str(bench.teacher), str(answers), *map(str, bench.texts), "--"]
    measured = subprocess.run([*command, *map(str, missing)])
    found |= json.loads(answers.read_text())
    save(results, record)
    if measured.returncode:
        raise SystemExit(f"{EVALUATE} failed with {measured.returncode}")


def make_windows(data: str, bench: Bench) -> None:
    """The training text as windows, once for all parts."""
    asked, out = bench.settings, bench.out("windows.jsonl")
    if not out.exists():
        count = max(asked.windows, asked.windows_beside_trl, asked.kill_steps + 1)
        command = [str(PEERS / "windows.py"), str(bench.teacher), data, str(out), str(count), str(asked.seqlen)]
        subprocess.run([sys.executable, *command], check=True)


def opened(results: Path, bench: Bench) -> dict[str, Any]:
    """The results there are, refused where they are of other settings."""
    record: dict[str, Any] = {"settings": asdict(bench.settings), "students": [], "runs": {}, "quality": {}}
    record |= json.loads(results.read_text()) if results.exists() else {"imports": {}}
    if record["settings"] != asdict(bench.settings):
        raise SystemExit(f"{results}: made with {record['settings']}, asked is {asdict(bench.settings)}; take another")
    record["students"] = list(dict.fromkeys([*record["students"], *(student.name for student in bench.students)]))
    tools = _tools(bench.pythons)
    names = {"teacher": bench.teacher.name, "texts": [text.stem for text in bench.texts]}
    record["surroundings"] = {**surroundings(tools), "command": names}
    for tool in tools:
        if tool.name not in record["imports"]:
            usage = measure([tool.python, *tool.imports], bench.out("imports.log"))
            record["imports"][tool.name] = asdict(usage)
    return record


def _tools(pythons: dict[str, str]) -> list[Tool]:
    """The tools as `quantize.py` knows them, for their versions and imports."""
    scripts = {"wtool": ("-c", IMPORTS), "trl": (str(PEERS / "run_trl.py"),)}
    return [Tool(name, python, (), scripts[name], PACKAGES[name]) for name, python in pythons.items()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, nargs="?")
    parser.add_argument("--students", type=Path, nargs="+", help="pruned teachers; their names tell results apart")
    parser.add_argument("--data", help="text to learn from, as `wtool distill --data` takes it")
    parser.add_argument("--held", type=Path, nargs="+", help="held-out texts")
    parser.add_argument("--trl", metavar="PYTHON")
    parser.add_argument("--only", default=",".join((*PARTS, "kill")), help="parts, with commas")
    parser.add_argument("--tokens", type=int, default=16384, help="of a training in the parts losses and cache")
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window")
    parser.add_argument("--held-out", type=int, default=2, help="windows that wtool judges by in the training")
    parser.add_argument("--evaluate-every", type=int, help="steps [default: half of them]")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--schedule", default="cosine", help="in the parts losses and cache")
    parser.add_argument("--precision", default="float32", help="of wtool, but in the part trl, which has both")
    parser.add_argument("--trl-steps", type=int, default=6)
    parser.add_argument("--trl-turns", type=int, default=2, help="of each tool; the faster one counts")
    parser.add_argument("--kill-steps", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("bench-distill"), help="for outputs and logs")
    parser.add_argument("--json", type=Path, default=Path("distill.json"), help="where results are, and go")
    parser.add_argument("--tables", type=Path, metavar="RESULTS", help="print results as markdown, and do nothing else")
    given = parser.parse_args()
    if not given.tables and not (given.teacher and given.students and given.data and given.held):
        parser.error("give a teacher, --students, --data and --held")
    if unknown := {*given.only.split(",")} - {*PARTS, "kill"}:
        parser.error(f"--only: no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}, kill")
    return given


def asked_of(given: argparse.Namespace) -> Bench:
    steps = max(1, given.tokens // (given.batch * given.seqlen))
    settings = Settings(
        steps,
        given.batch,
        given.seqlen,
        given.held_out,
        given.evaluate_every or max(1, steps // 2),
        given.lr,
        given.schedule,
        given.precision,
        given.trl_steps,
        given.trl_turns,
        given.kill_steps,
    )
    pythons = {"wtool": sys.executable} | ({"trl": given.trl} if given.trl else {})
    return Bench(given.teacher, tuple(given.students), tuple(given.held), settings, given.folder, pythons)


def main() -> None:
    given = arguments()
    if given.tables:
        print_tables(json.loads(given.tables.read_text()))
        return
    bench = asked_of(given)
    bench.folder.mkdir(parents=True, exist_ok=True)
    record = opened(given.json, bench)
    make_windows(given.data, bench)
    for part in (part for part in given.only.split(",") if part != "trl" or given.trl):
        run_part(part, bench, given.json, record)
    print_tables(record)


if __name__ == "__main__":
    main()
