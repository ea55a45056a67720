"""How much of the other model arcee_fusion takes, and what that is worth: wtool's thresholds beside mergekit's.

    python benchmarks/merge_arcee.py --experts bible=DIR fortunes=DIR shakespeare=DIR --held DIR
        --mergekit PATH/TO/mergekit-yaml [--factors 1.85,2.2] [--tokens 4096] --json RESULTS

Of each two experts, in both orders, the first is the base. Told are the share taken of the weights in which they
differ, and perplexity on the held-out text of each domain, as `merge_quality.py` measures it; further factors for the
first two.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from merge_quality import Subject, middle

from wtool.checkpoint import open_checkpoint


def merged(base: Path, model: Path, factor: float | None, program: str, folder: Path) -> Path:
    """A merge by wtool, or without a factor by mergekit in bfloat16."""
    recipe, out = folder / "recipe.yml", folder / "out"
    content: dict[str, Any] = {"merge_method": "arcee_fusion", "base_model": str(base), "dtype": "bfloat16"}
    content["models"] = [{"model": str(model)}]
    if factor is not None:
        content["parameters"] = {"iqr_factor": factor}
    recipe.write_text(json.dumps(content))
    shutil.rmtree(out, ignore_errors=True)
    ours = [sys.executable, "-m", "wtool", "merge", str(recipe), "-o", str(out), "--quiet"]
    theirs = [program, str(recipe), str(out), "--quiet", "--random-seed", "0"]
    command = theirs if factor is None else ours
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return out


def share_taken(base: Path, model: Path, out: Path) -> float:
    """Of the weights in which two models differ."""
    opened = [open_checkpoint(str(path)) for path in (base, model, out)]
    moved = taken = 0
    for name in opened[0].tensors:
        original, other, made = (checkpoint.read(name) for checkpoint in opened)
        moved += int(torch.count_nonzero(original != other))
        taken += int(torch.count_nonzero(original != made))
    return taken / moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", required=True, metavar="DOMAIN=DIR")
    parser.add_argument("--held", type=Path, required=True, help="a folder of DOMAIN.txt")
    parser.add_argument("--mergekit", required=True, help="the mergekit-yaml program")
    parser.add_argument("--factors", default="1.85,2.2")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--folder", type=Path, default=Path("bench-merge-arcee"))
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    experts: Mapping[str, Path] = {
        domain: Path(path).resolve() for domain, _, path in (text.partition("=") for text in given.experts)
    }
    subject = Subject(next(iter(experts.values())), experts, given.held.resolve(), given.tokens)
    given.folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    runs: list[dict[str, Any]] = []
    for number, (base, model) in enumerate(permutations(experts, 2)):
        further = [float(factor) for factor in given.factors.split(",")] if number == 0 else []
        for factor in (None, 1.5, *further):
            out = merged(experts[base], experts[model], factor, given.mergekit, given.folder)
            found = subject.perplexities(out)
            run = {"base": base, "model": model, "tool": "mergekit 0.1.5" if factor is None else "wtool"}
            run |= {"iqr_factor": factor or 1.5, "taken": share_taken(experts[base], experts[model], out)}
            runs.append(run | {"perplexity": found, "mean": middle(found)})
            print(json.dumps(runs[-1]), file=sys.stderr)
            given.json.write_text(json.dumps({"commit": commit, "tokens": given.tokens, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
