"""What `wtool quantize --format gguf` does and prints."""

import json
import time
from functools import partial
from pathlib import Path

from wtool import console, options
from wtool.console import emit, emit_json, human_bytes
from wtool.executors import chosen
from wtool.executors.local import Outcome
from wtool.plan import Plan
from wtool.writer import MANIFEST

from .gguf_planner import plan_gguf
from .recipe import QuantRecipe


def make_gguf(
    recipe: QuantRecipe,
    output: Path | None,
    sketch: Path | None,
    executor: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Plan and write a GGUF file; the exit code."""
    plan = plan_gguf(recipe, headers_only=dry_run)
    if dry_run:
        options.draw(plan, sketch)
        return _show(plan, as_json)
    assert output is not None
    begin = time.perf_counter()
    for warning in plan.warnings:
        console.warn(warning)
    whole = sum(info.nbytes for info in plan.outputs.values())
    with console.progress("quantizing", whole, quiet=quiet, unit="bytes") as progress:
        make = partial(plan_gguf, recipe)
        outcome = chosen.run(executor, make, plan, output, force=force, progress=progress)
    _tell(plan, outcome, time.perf_counter() - begin, as_json)
    return 0


def _show(plan: Plan, as_json: bool) -> int:
    summary = plan.about["summary"]
    if as_json:
        emit_json({**plan.summary(1), **summary})
        return 0
    emit(f"{plan.shards[0].filename}: {_sizes(plan)}")
    for kind, count in summary["types"].items():
        emit(f"  {count} tensors: {kind}")
    for what, matrix in plan.about.get("rotation", {}).items():
        emit(f"  rotated: {what}, by {matrix}")
    for warning in plan.warnings:
        emit(f"warning: {warning}")
    emit("no problem found")
    return 0


def _tell(plan: Plan, outcome: Outcome, seconds: float, as_json: bool) -> None:
    output = outcome.out
    report = json.loads((output / MANIFEST).read_bytes()).get("report", {})
    if as_json:
        emit_json(
            {
                "output": str(output),
                "file": str(output / plan.shards[0].filename),
                "already_there": outcome.already_there,
                "resumed_bytes": outcome.resumed_bytes,
                **plan.about["summary"],
                "report": report,
                "seconds": round(seconds, 3),
                "warnings": list(plan.warnings),
            }
        )
    elif outcome.already_there:
        emit(f"{output}: there already, made by this recipe from these inputs; nothing to do (--force makes it anew)")
    else:
        resumed = f", {human_bytes(outcome.resumed_bytes)} of it from the run before" if outcome.resumed_bytes else ""
        emit(f"{output / plan.shards[0].filename}: {_sizes(plan)}, in {seconds:.1f} s{resumed}")


def _sizes(plan: Plan) -> str:
    summary = plan.about["summary"]
    return (
        f"{human_bytes(summary['bytes_before'])} become {human_bytes(summary['bytes_after'])}, "
        f"{summary['bits_per_weight']:.2f} bits per weight"
    )
