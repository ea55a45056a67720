"""`wtool demo`: merges two small experts that ship with the package, and measures what each model is worth.

A base model of a million parameters was really trained on Python's manual and on Python code, and one expert was
fine-tuned from it on each (examples/make_demo.py). The merges are made here by `wtool merge`, and every figure is
measured in this run, on text that no model was trained on.
"""

import io
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from typing import Annotated

import typer

from wtool.errors import RuntimeProblem

app = typer.Typer(add_completion=False, rich_markup_mode=None)

MODELS = Path(__file__).parents[1] / "demo" / "models"
CHARACTERS = 24_000  # of text that each model is measured on, of each kind
_EXPERTS = ("docs", "code")
MERGES: dict[str, list[str]] = {
    "linear": [*_EXPERTS, "--method", "linear"],
    "slerp": [*_EXPERTS, "--method", "slerp", "-t", "0.5"],
    "task_arithmetic": [*_EXPERTS, "--method", "task_arithmetic", "--base", "base", "--weight", "0.6"],
    "ties": [*_EXPERTS, "--method", "ties", "--base", "base", "--density", "0.5", "--no-normalize", "--lambda", "0.5"],
    "dare_ties": [*_EXPERTS, "--method", "dare_ties", "--base", "base", "--density", "0.8", "--weight", "0.5"],
    "linear with adapter": ["base+docs-lora", "code", "--method", "linear"],
}


@dataclass(frozen=True)
class Row:
    """A model, and its perplexity on each domain's held-out text."""

    name: str
    command: str | None  # that made it
    docs: float
    code: float

    @property
    def both(self) -> float:
        """The geometric mean: the exponential of the mean loss over both domains."""
        return exp((log(self.docs) + log(self.code)) / 2)


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option(help="folder to keep the merged models in")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no remarks")] = False,
) -> None:
    """Merge two small trained experts in six ways, and show that a merge holds both skills."""
    from wtool import console

    start = time.perf_counter()
    if not quiet:
        console.remark("Two experts were fine-tuned from one base, on the Python manual (docs) and on Python code.")
    with tempfile.TemporaryDirectory(prefix="wtool-demo-") as scratch:
        rows = _measure(keep or Path(scratch), quiet)
    seconds = time.perf_counter() - start
    if as_json:
        console.emit_json({"rows": [{**asdict(row), "both": row.both} for row in rows], "seconds": round(seconds, 1)})
        return
    best = min(range(len(rows)), key=lambda i: rows[i].both)
    console.table(
        "Perplexity on text that none of them was trained on (lower is better)",
        ["model", "docs", "code", "both"],
        [[row.name, f"{row.docs:.2f}", f"{row.code:.2f}", f"{row.both:.2f}"] for row in rows],
        best=best,
    )
    console.emit(_reading(rows))
    if not quiet:
        console.remark(f"{len(rows)} models merged and measured in {seconds:.1f} s")
        console.remark(f"the best was made by: {rows[best].command}" if rows[best].command else "no merge was best")


def _measure(folder: Path, quiet: bool) -> list[Row]:
    from wtool import console
    from wtool.demo.texts import held_out_text

    texts = [held_out_text("docs", CHARACTERS), held_out_text("code", CHARACTERS)]
    folder.mkdir(parents=True, exist_ok=True)
    models = {"base": "base", "docs expert": "docs", "code expert": "code"}
    rows: list[Row] = []
    with console.progress("measuring", len(models) + len(MERGES), quiet=quiet, unit="models") as advance:
        for name, model in models.items():
            rows.append(_row(name, None, str(MODELS / model), texts))
            advance(1)
        for name, arguments in MERGES.items():
            out = folder / name.replace(" ", "-")
            _merge([*map(_with_place, arguments), "-o", str(out)])
            rows.append(_row(name, f"wtool merge {' '.join(arguments)}", str(out), texts))
            advance(1)
    return rows


def _with_place(argument: str) -> str:
    """The demo's models are named shortly in the commands shown."""
    names = argument.split("+")
    known = all((MODELS / name).is_dir() for name in names)
    return "+".join(str(MODELS / name) for name in names) if known else argument


def _merge(arguments: Sequence[str]) -> None:
    from wtool.cli import run

    shown = io.StringIO()
    with redirect_stdout(shown):
        code = run(["merge", *arguments, "--quiet", "--json"])
    if code:
        raise RuntimeProblem(f"the demo's `wtool merge {' '.join(arguments)}` ended with exit code {code}")
    json.loads(shown.getvalue())


def _row(name: str, command: str | None, reference: str, texts: Sequence[str]) -> Row:
    from wtool.checkpoint import open_checkpoint
    from wtool.evaluate import evaluate
    from wtool.loading import load_model, load_tokenizer

    checkpoint = open_checkpoint(reference)
    model, tokenizer = load_model(checkpoint, dtype="F32"), load_tokenizer(checkpoint)
    docs, code = (evaluate(model, tokenizer, text, window=512, stride=512, batch=8).perplexity for text in texts)
    return Row(name, command, docs, code)


def _reading(rows: Sequence[Row]) -> str:
    """What the table says, in words."""
    experts = [row for row in rows if row.name.endswith("expert")]
    merges = [row for row in rows if row.command]
    merge, expert = min(merges, key=lambda row: row.both), min(experts, key=lambda row: row.both)
    better = sum(row.both < expert.both for row in merges)
    if not better:
        return f"No merge is better on both than the {expert.name} alone ({expert.both:.2f})."
    return (
        f"{better} of {len(merges)} merges hold both skills better than either expert alone: "
        f"{merge.name} {merge.both:.2f}, against {expert.both:.2f} for the better expert ({expert.name})."
    )
