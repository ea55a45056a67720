"""Which merge of three real experts is best: held-out perplexity by method and domain, wtool's beside mergekit's.

    python benchmarks/merge_quality.py BASE --experts bible=DIR fortunes=DIR shakespeare=DIR --held DIR
        [--mergekit PATH/TO/mergekit-yaml] [--cases REGEX] [--folder bench-merge-quality] [--json RESULTS]

BASE is what the experts were fine-tuned from; DIR/bible.txt and so on are texts that nothing was trained on. Both tools
read the same recipe (those that round at random are wtool's alone); both outputs are evaluated by `wtool.evaluate`, in
float32, on the first tokens of each text. With --json what was measured is kept, and what is there is not measured
again.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from merge_peers.cases import CASES, Case
from transformers import AutoModelForCausalLM, AutoTokenizer

from wtool.evaluate import evaluate

WINDOW = 512

Perplexities = dict[str, float]  # by domain


@dataclass(frozen=True)
class Subject:
    """What is merged, and what it is measured on."""

    base: Path
    experts: Mapping[str, Path]  # domain -> checkpoint
    held: Path
    tokens: int  # of each text

    def perplexities(self, folder: Path) -> Perplexities:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        found: Perplexities = {}
        for domain in self.experts:
            text = (self.held / f"{domain}.txt").read_text(encoding="utf-8")
            told = evaluate(model, tokenizer, text, window=WINDOW, stride=WINDOW, limit=self.tokens)
            found[domain] = told.perplexity
        return found


def merged(subject: Subject, case: Case, tool: str, program: str, folder: Path) -> Perplexities:
    """One merge by one tool, and what it says of each domain; nothing where mergekit fails."""
    recipe, out = folder / "recipe.yml", folder / tool
    recipe.write_text(case.recipe(subject.base, list(subject.experts.values())))
    shutil.rmtree(out, ignore_errors=True)
    command = {
        "wtool": [sys.executable, "-m", "wtool", "merge", str(recipe), "-o", str(out), "--quiet"],
        "mergekit": [program, str(recipe), str(out), "--quiet", "--random-seed", "0"],
    }[tool]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode and tool == "mergekit":
        print(f"{case.name}: mergekit fails: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    if done.returncode:
        raise SystemExit(f"{case.name}: {tool} failed:\n{done.stderr[-2000:]}")
    found = subject.perplexities(out)
    shutil.rmtree(out)
    return found


def middle(found: Perplexities) -> float:
    """The geometric mean over the domains."""
    return exp(sum(map(log, found.values())) / len(found))


def tell(measured: Mapping[str, Mapping[str, Perplexities]]) -> None:
    """Print the table."""
    domains = list(next(iter(measured.values()))["wtool"])
    print(f"{'':32} {'tool':9}" + "".join(f"{domain:>13}" for domain in domains) + f"{'all':>9}   against mergekit")
    for name, tools in measured.items():
        for tool, found in tools.items():
            if not found:
                print(f"{name:32} {tool:9} fails")
                continue
            ratio = ""
            if tool == "wtool" and tools.get("mergekit"):
                worst = max(found[domain] / tools["mergekit"][domain] - 1 for domain in domains)
                ratio = f"   {worst:+.2%} at most"
            figures = "".join(f"{found[domain]:13.3f}" for domain in domains)
            print(f"{name:32} {tool:9}{figures}{middle(found):9.3f}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--experts", nargs="+", required=True, metavar="DOMAIN=DIR")
    parser.add_argument("--held", type=Path, required=True, help="a folder of DOMAIN.txt")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--mergekit", default="", help="the mergekit-yaml program; without it only wtool is measured")
    parser.add_argument("--tools", default="wtool,mergekit")
    parser.add_argument("--cases", default="", help="only those whose name has this regular expression")
    parser.add_argument("--folder", type=Path, default=Path("bench-merge-quality"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    experts = {domain: Path(path).resolve() for domain, _, path in (text.partition("=") for text in given.experts)}
    subject = Subject(given.base.resolve(), experts, given.held.resolve(), given.tokens)
    given.folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    measured: dict[str, dict[str, Perplexities]] = kept.setdefault("perplexity", {})

    def keep(name: str, tool: str, found: Perplexities) -> None:
        measured.setdefault(name, {})[tool] = found
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        versions = {"torch": version("torch"), "transformers": version("transformers"), "mergekit": "0.1.5"}
        if given.json:
            record = {**kept, "commit": commit, "versions": versions, "tokens": given.tokens, "window": WINDOW}
            given.json.write_text(json.dumps(record, indent=1) + "\n")

    for name, path in {"base": subject.base, **{f"expert {each}": path for each, path in experts.items()}}.items():
        if name not in measured:
            keep(name, "wtool", subject.perplexities(path))
    for case in CASES:
        for tool in given.tools.split(",") if re.search(given.cases, case.name) else ():
            has_tool = tool == "wtool" or (given.mergekit and case.shared)
            if has_tool and tool not in measured.get(case.name, {}):
                keep(case.name, tool, merged(subject, case, tool, given.mergekit, given.folder))
                print(f"{case.name}: {tool}", file=sys.stderr)
    tell(measured)


if __name__ == "__main__":
    main()
