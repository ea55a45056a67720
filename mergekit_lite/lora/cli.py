"""`wtool merge-lora` and `wtool extract-lora`: options -> what was asked -> plan -> run."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options

from ..job import check_output

if TYPE_CHECKING:
    from wtool.plan import Plan

merge_app = typer.Typer(add_completion=False, rich_markup_mode=None)
extract_app = typer.Typer(add_completion=False, rich_markup_mode=None)

MERGE_EPILOG = """\
concat: the weighted sum, exact; ranks add up.  svd: the same, cut to --rank [default: the largest rank there is].
knots, core: updates are aligned in a common space and merged there by --merge, then cut to --rank, if one is given.
--weight and --density are given once for all adapters, or once an adapter, in their order.
A stopped merge goes on where it was when the same command is run again."""
EXTRACT_EPILOG = """\
Linear layers that changed become factors, and a head of its own; --embed adds the embedding. What else changed is
told. First both checkpoints are looked through for what changed (and with --energy for ranks), then each matrix is
taken apart; either goes on where it was stopped when the same command is run again."""
SHOWN = 5  # modules in the table at the end
LARGE = 0.5  # a relative error that is worth a remark
Workers = Annotated[int | None, typer.Option(min=1, help="threads [default: processors + 1]")]
Dtype = Annotated[str, typer.Option(help="type of the factors: float32, bfloat16, float16")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")]


@merge_app.command(epilog=MERGE_EPILOG)
def merge_lora(
    adapters: Annotated[list[str], typer.Argument(help="LoRA adapters: folders, or ids on the Hub")],
    output: Output = None,
    method: Annotated[str, typer.Option("--method", "-m", help="concat, svd, knots or core")] = "concat",
    weight: Annotated[list[float] | None, typer.Option("--weight", "-w", help="factor of an adapter")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="highest rank of a module")] = None,
    merge: Annotated[str, typer.Option(help="knots, core: task_arithmetic, ties, dare_linear or dare_ties")] = "ties",
    density: Annotated[list[float] | None, typer.Option(help="share of an aligned update to keep, 0 to 1")] = None,
    normalize: Annotated[bool | None, typer.Option(help="divide by the weights that take part")] = None,
    lambda_: Annotated[float, typer.Option("--lambda", help="factor of the result")] = 1.0,
    seed: Annotated[int, typer.Option(help="of random masks")] = 0,
    dtype: Dtype = "float32",
    ignore_bases: Annotated[
        bool, typer.Option("--ignore-bases", help="combine adapters that name other bases")
    ] = False,
    workers: Workers = None,
    force: options.Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and every problem")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine LoRA adapters into one, without their base."""
    from .merge import LoraMerge, plan_lora_merge

    start = time.perf_counter()
    check_output(output, dry_run)
    asked = LoraMerge(
        tuple(adapters), method, tuple(weight or ()), rank, merge, tuple(density or ()), normalize, lambda_, seed, dtype
    )
    plan = plan_lora_merge(asked, ignore_bases=ignore_bases)
    if dry_run:
        raise typer.Exit(_show(plan, workers, as_json))
    assert output is not None
    _run(plan, output, "merging", start, workers, force, as_json, quiet)


@extract_app.command(epilog=EXTRACT_EPILOG)
def extract_lora(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the checkpoint that was fine-tuned")],
    base: Annotated[str, typer.Option("--base", help="the checkpoint it was fine-tuned from")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    rank: Annotated[int | None, typer.Option(min=1, help="of every module [default: 32, without --energy]")] = None,
    energy: Annotated[
        float | None, typer.Option(help="instead: each module's lowest rank that keeps this share of its change²")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="with --energy: no module gets a higher one")] = None,
    include: Annotated[str | None, typer.Option(metavar="REGEX", help="only modules whose names match")] = None,
    exclude: Annotated[str | None, typer.Option(metavar="REGEX", help="no modules whose names match")] = None,
    randomized: Annotated[
        bool, typer.Option("--randomized", help="random projections: faster on large matrices, nearly as good")
    ] = False,
    embed: Annotated[bool, typer.Option("--embed", help="factors of the embedding, and of a head tied to it")] = False,
    save_modules: Annotated[
        bool, typer.Option("--save-modules", help="keep whole what changed and has no factors (norms, embeddings)")
    ] = False,
    seed: Annotated[int, typer.Option(help="of random projections")] = 0,
    dtype: Dtype = "float32",
    workers: Workers = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a LoRA adapter of what fine-tuning changed."""
    from wtool import console
    from wtool.checkpoint import open_checkpoint

    from .extract import LoraExtract, plan_lora_extract

    start = time.perf_counter()
    rank = 32 if rank is None and energy is None else rank
    asked = LoraExtract(
        tuned, base, rank, energy, max_rank, include, exclude, randomized, embed, save_modules, seed, dtype
    )
    with console.progress("looking", open_checkpoint(base).nbytes, quiet=quiet) as advance:
        plan = plan_lora_extract(asked, output, force=force, workers=workers, progress=advance)
    _run(plan, output, "extracting", start, workers, force, as_json, quiet)


def _show(plan: "Plan", workers: int | None, as_json: bool) -> int:
    """Print a plan; the exit code tells whether it can be carried out."""
    from wtool.console import emit, emit_json
    from wtool.executors.local import default_workers

    threads = workers or default_workers()
    emit_json(plan.summary(threads)) if as_json else emit(plan.describe(threads))
    return 3 if plan.problems else 0


def _run(
    plan: "Plan", output: Path, label: str, start: float, workers: int | None, force: bool, as_json: bool, quiet: bool
) -> None:
    from wtool import console
    from wtool.executors import local
    from wtool.outcome import outcome_record
    from wtool.writer import MANIFEST

    plan.check()
    for warning in plan.warnings:
        console.warn(warning)
    with console.progress(label, sum(info.nbytes for info in plan.outputs.values()), quiet=quiet) as advance:
        outcome = local.run(plan, output, workers=workers, force=force, progress=advance)
    seconds = time.perf_counter() - start
    report = json.loads((output / MANIFEST).read_bytes()).get("report", {})
    if as_json:
        size = plan.bytes_to_write
        console.emit_json(outcome_record(output, outcome, seconds, plan.warnings, modules=report, bytes=size))
    elif outcome.already_there:
        console.emit(f"{output}: there already, made of these inputs; nothing to do (--force makes it anew)")
    else:
        _print(output, plan, report, seconds)


def _print(output: Path, plan: "Plan", report: dict[str, Any], seconds: float) -> None:
    from wtool import console

    ranks = [entry["rank"] for entry in report.values()]
    span = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    size = console.human_bytes(plan.bytes_to_write)
    console.emit(f"{output}: {len(report)} modules, {span}, {size} in {seconds:.1f} s")
    cut = {module: entry for module, entry in report.items() if "relative_error" in entry}
    worst = sorted(cut, key=lambda module: -cut[module]["relative_error"])[:SHOWN]
    if not worst:
        return
    title, columns = "the modules furthest from what they stand for", ["module", "rank", "relative error"]
    rows = [[module, str(cut[module]["rank"]), f"{cut[module]['relative_error']:.4f}"] for module in worst]
    if "change" in cut[worst[0]]:
        columns.append("change of the weights")
        rows = [[*row, f"{cut[module]['change']:.2g}"] for module, row in zip(worst, rows, strict=True)]
        if sum(entry["relative_error"] > LARGE for entry in cut.values()) > len(cut) / 2:
            console.remark("most of the change is not in these ranks (rounding, too, has all ranks): see wtool eval")
    console.table(title, columns, rows)
