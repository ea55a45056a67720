"""examples/pipelines/three-experts.yaml on a real model: run once, and again with two kill -9 on the way.

    python benchmarks/pipeline.py MODEL --texts TEXT.txt TEXT.txt TEXT.txt [--folder bench-pipeline] [--json RESULTS]

The first part of each text is held out; on the rest an expert is fine-tuned from the model (LoRA, cross-entropy). Both
runs are of the same command in folders of their own beside copies of the same inputs; every file that they make must be
equal to the byte, manifests included.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from quantize import Tool, surroundings

EXAMPLE = Path(__file__).parents[1] / "examples" / "pipelines" / "three-experts.yaml"
EXPERTS = ("first", "second", "third")
HELD = 8000  # characters of each text that nothing is trained on
EXPERT = ("--lora", "16", "--kd", "0", "--ce", "1", "--lr", "5e-4")
WINDOWS = ("--batch", "4", "--seqlen", "256", "--held-out", "2")
KILLS = (0.35, 0.4)  # share of an undisturbed run's time until each


def wtool(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "wtool", *arguments], cwd=folder, stdout=subprocess.PIPE)


def told(*arguments: str, folder: Path) -> dict[str, Any]:
    """What a command tells with --json."""
    process = wtool(*arguments, "--json", "--quiet", folder=folder)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"wtool {' '.join(arguments)}: {output.decode()[-2000:]}")
    return json.loads(output)


def prepare(folder: Path, model: Path, texts: list[Path], steps: int) -> None:
    """Texts and experts."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        shutil.copytree(model, folder / "base")
    whole = []
    for expert, path in zip(EXPERTS, texts, strict=True):
        text = path.read_text(encoding="utf-8")
        (folder / f"held-{path.stem}.txt").write_text(text[:HELD], encoding="utf-8")
        (folder / f"train-{path.stem}.txt").write_text(text[HELD:], encoding="utf-8")
        whole.append(text[HELD:])
        given = ("--data", f"train-{path.stem}.txt", "--steps", str(steps), *EXPERT, *WINDOWS)
        told("distill", "base", "base", *given, "-o", expert, folder=folder)
    if not (folder / "train.txt").exists():
        (folder / "train.txt").write_text("\n\n".join(whole), encoding="utf-8")


def command(texts: list[Path], variables: list[str]) -> list[str]:
    held = "[" + ", ".join(f"held-{path.stem}.txt" for path in texts) + "]"
    given = [f"held={held}", *variables]
    return ["run", str(EXAMPLE), "-o", "out", *(part for each in given for part in ("--set", each))]


def kill(folder: Path, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Kill a run after some time; tells what was done by then."""
    process = wtool(*arguments, "--quiet", folder=folder)
    try:
        process.wait(seconds)
        raise SystemExit("the pipeline ended before it could be killed")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = told(*arguments, "--dry-run", folder=folder)["to_run"]
    return {"after_seconds": round(seconds, 1), "jobs_left": left}


def digests(out: Path) -> dict[str, str]:
    """Of every file that the jobs made; results.* tell times."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and ".jobs" not in path.parts]
    files = [path for path in files if not path.name.startswith("results.")]
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, nargs=3, required=True)
    parser.add_argument("--expert-steps", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], help="a variable of the pipeline: name=value")
    parser.add_argument("--folder", type=Path, default=Path("bench-pipeline"))
    parser.add_argument("--json", type=Path, default=Path("pipeline.json"))
    given = parser.parse_args()
    whole, cut = given.folder / "whole", given.folder / "killed"
    prepare(whole, given.model, given.texts, given.expert_steps)
    if not cut.exists():
        shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("out", ".out*"))
    arguments = command(given.texts, given.set)
    forecast = told(*arguments, "--dry-run", folder=whole)["jobs"]
    begin = time.perf_counter()
    results = told(*arguments, folder=whole)["results"]
    seconds = time.perf_counter() - begin
    kills = [kill(cut, arguments, share * seconds) for share in KILLS]
    told(*arguments, folder=cut)
    found = [digests(folder / "out") for folder in (whole, cut)]
    unlike = sorted(name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name))
    about = surroundings([Tool("wtool", sys.executable, (), (), ("torch", "transformers"))])
    record = {
        "surroundings": {**about, "command": [Path(part).name if "/" in part else part for part in sys.argv]},
        "seconds": round(seconds, 1),
        "forecast": [{key: job[key] for key in ("job", "bytes", "seconds")} for job in forecast if job.get("bytes")],
        "results": results,
        "kills": kills,
        "files": len(found[0]),
        "unlike": unlike,
    }
    given.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(found[0])} files, unlike after two kills: {unlike or 'none'}", file=sys.stderr)


if __name__ == "__main__":
    main()
