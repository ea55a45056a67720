"""`wtool quantize`: options or a YAML file -> recipe -> plan -> run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError
from wtool.ranks import current, one_process, together

if TYPE_CHECKING:
    from wtool.executors.local import Outcome

    from .planner import QuantPlan
    from .recipe import QuantRecipe

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
Methods: gptq, gptaq, awq, signround, awq+gptq, awq+signround (calibrated); rtn (rounding alone; needs no text and no
model).
Calibration: text files, JSONL (text, messages or input_ids), datasets of the Hub; without --calib the text that
Python carries. --ignore and --layer-bits take a part of a module's name, or a regular expression after "re:".
--scheme fp8-dynamic (or fp8-block, fp8-tensor) writes FP8, without text; its name says all of the numbers.
--format gguf --type Q4_K_M writes one file for llama.cpp, with or without --stats; its type says all else.
A stopped quantization goes on where it was when the same command is run again."""


def number_of_bits(text: str) -> int | float:
    """A number of bits; with a point it is an average."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}': give 2, 3, 4, 5, 6 or 8, or an average with a point, as 3.5") from None


@app.command(epilog=EPILOG)
@together
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint to quantize, or a recipe file (YAML)")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", help="gptq, gptaq, awq, awq+gptq, signround, awq+signround or rtn [default: gptq]"
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            "-b",
            parser=number_of_bits,
            metavar="NUMBER",
            help="2, 3, 4, 5, 6 or 8; with a point, as 3.5, an average to be spread over layers [default: 4]",
        ),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="of all weights on disk, as 4GB, in the place of bits")
    ] = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option("--candidate", metavar="BITS[/GROUP]", help="what layers may get where bits are spread"),
    ] = None,
    save_allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the recipe with every layer's bits (YAML)")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", "-g", help="inputs that share a scale; -1: a row [default: 128]")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="without or with zero points [default: without, but for awq]"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", "-f", help="compressed-tensors, gptq, gptq_v2, awq, fp8, gguf [default: the first]"),
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help="FP8: fp8-dynamic (a scale a row), fp8-block (128 x 128) or fp8-tensor")
    ] = None,
    type: Annotated[
        str | None, typer.Option("--type", "-t", help="of a GGUF file: Q4_K_M, Q8_0, F16, … [default: Q4_K_M]")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="refuse what transformers, vllm, gptqmodel or autogptq cannot load")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="devices that the target splits layers over")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="modules to leave as they are")] = None,
    layer_bits: Annotated[list[str] | None, typer.Option(metavar="FILTER=BITS", help="other bits for some")] = None,
    calib: options.Calib = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    stats: Annotated[str | None, typer.Option(help="folder of `wtool calibrate`, in the place of text")] = None,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="turn outliers away by Hadamard matrices [default: no]")
    ] = None,
    rotate_seed: Annotated[int | None, typer.Option(min=0, help="of the signs of those matrices [default: 0]")] = None,
    damping: Annotated[float | None, typer.Option(help="share of the mean diagonal to add [default: 0.01]")] = None,
    lift: Annotated[
        bool | None, typer.Option(help="count short tokens, as the first is, like one of usual length [default: yes]")
    ] = None,
    act_order: Annotated[
        bool | None, typer.Option(help="columns in the order of their activations [default: yes]")
    ] = None,
    static_groups: Annotated[
        bool | None, typer.Option(help="scales from the weights as they were [default: yes]")
    ] = None,
    clip: Annotated[bool | None, typer.Option(help="search how much of each range to cover [default: yes]")] = None,
    refine: Annotated[
        int | None, typer.Option(min=0, help="times to go over codes and scales again [default: 1]")
    ] = None,
    iters: Annotated[
        int | None, typer.Option(min=1, help="signround: steps that a block is learned in [default: 50]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="signround: samples for each step [default: 8]")] = None,
    lr: Annotated[
        float | None, typer.Option(help="signround: rate of the first step [default: 1 / iters, at most 1/20]")
    ] = None,
    sequential: Annotated[
        bool | None, typer.Option(help="fit each linear to what the quantized ones before it feed it [default: yes]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="type of what is not quantized [default: the model's]")] = None,
    device: options.Device = "auto",
    compute_dtype: options.ComputeDtype = "auto",
    activations: options.Activations = "device",
    batch_tokens: options.BatchTokens = 2048,
    shard_size: Annotated[str, typer.Option(help="largest output file")] = "5GB",
    executor: options.Executor = "local",
    low_disk: options.LowDisk = False,
    force: options.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the plan and every problem; read no weights")
    ] = False,
    sketch: options.Sketch = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a checkpoint, streamed block by block."""
    dry_run = dry_run or sketch is not None
    if output is None and not dry_run:
        raise UsageError("where to? give the output folder with -o OUT (or --dry-run to see the plan)")
    from wtool.recipe_file import asked, given

    from .recipe import QuantRecipe

    calibration = {"data": calib or None, "samples": samples, "seqlen": seqlen, "seed": seed}
    calibration |= {"text_column": text_column, "split": split}
    flags: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "target_size": target_size,
        "candidates": candidates or None,
        "group_size": group_size,
        "symmetric": symmetric,
        "format": format,
        "scheme": scheme,
        "type": type,
        "target": target,
        "tensor_parallel": tensor_parallel,
        "ignore": ignore or None,
        "overrides": [_override(text) for text in layer_bits or []] or None,
        "calibration": given(calibration) or None,
        "statistics": stats,
        "rotate": None if rotate is None else "residual+values" if rotate else "none",
        "rotate_seed": rotate_seed,
        "damping": damping,
        "lift": lift,
        "act_order": act_order,
        "static_groups": static_groups,
        "clip": clip,
        "refine": refine,
        "iters": iters,
        "batch": batch,
        "lr": lr,
        "way": None if sequential is None else "sequential" if sequential else "one-pass",
        "dtype": dtype,
    }
    from wtool.console import parse_size
    from wtool.executors import chosen

    from .run import plan_asked

    recipe = asked(QuantRecipe, "quantize", "model", model, given(flags))
    if recipe.format == "gguf":
        options.refuse_low_disk(low_disk, "writing GGUF")
        one_process("writing GGUF")
        from .gguf_cli import make_gguf

        raise typer.Exit(make_gguf(recipe, output, sketch, executor, dry_run, force, as_json, quiet))
    max_shard_bytes = parse_size(shard_size)
    if recipe.allocates:
        options.refuse_low_disk(low_disk, "spreading bits over layers")
        from .allocate_cli import allocated_plan, save_recipe

        where = options.where(device, compute_dtype, activations, batch_tokens, trust_remote_code)
        recipe, plan = allocated_plan(
            recipe, output, where, dry_run=dry_run, max_shard_bytes=max_shard_bytes, force=force, quiet=quiet
        )
        if save_allocation is not None:
            save_recipe(recipe, save_allocation)
    else:
        if save_allocation is not None:
            raise UsageError("--save-allocation: only an average (--bits 3.5) or a --target-size is spread over layers")
        downloads = options.downloads(low_disk, output)
        plan = plan_asked(recipe, headers_only=dry_run, low_disk=downloads, max_shard_bytes=max_shard_bytes)
    if dry_run:
        options.draw(plan.plan, sketch)
        raise typer.Exit(_show(recipe, plan, as_json))
    assert output is not None
    chosen.check(executor, plan.plan)
    options.check_low_disk(low_disk, plan.plan, executor)
    where = options.where(device, compute_dtype, activations, batch_tokens, trust_remote_code)
    _run(recipe, plan, output, where, executor, force, as_json, quiet)


def _override(text: str) -> dict[str, Any]:
    name, _, number = text.rpartition("=")
    if not name or not number.isdigit():
        raise UsageError(f"--layer-bits '{text}': write FILTER=BITS, e.g. down_proj=8")
    return {"filter": name, "bits": int(number)}


def _show(recipe: "QuantRecipe", plan: "QuantPlan", as_json: bool) -> int:
    """Print a plan; the exit code tells whether it can be carried out."""
    from collections import Counter

    from wtool.console import emit, emit_json, human_bytes

    from .allocate_cli import ABOUT, show_allocation

    summary = plan.plan.about["summary"]
    if as_json:
        told = plan.plan.summary(1)
        spread = {ABOUT: plan.plan.about[ABOUT]} if ABOUT in plan.plan.about else {}
        emit_json({**told, **summary, **spread, "left": dict(plan.left)})
        return 3 if plan.plan.problems else 0
    emit(
        f"{recipe.model}: {summary['layers']} linear layers of {summary['weights']:,} weights to "
        f"{summary['bits_per_weight']:.2f} bits each with scales, by {recipe.method}, as {recipe.format}; "
        f"{human_bytes(summary['bytes_before'])} become {human_bytes(summary['bytes_after'])}"
    )
    for scheme, count in summary["schemes"].items():
        emit(f"  {count} layers: {scheme}")
    show_allocation(plan)
    for what, matrix in plan.plan.about.get("rotation", {}).items():
        emit(f"  rotated: {what}, by {matrix}")
    for reason, count in Counter(plan.left.values()).items():
        first = next(name for name, why in plan.left.items() if why == reason)
        emit(f"  as it is: {count} ({reason}), the first is '{first}'")
    for warning in plan.plan.warnings:
        emit(f"warning: {warning}")
    for problem in plan.plan.problems:
        emit(f"problem: {problem}")
    emit("this plan cannot be carried out" if plan.plan.problems else "no problem found")
    return 3 if plan.plan.problems else 0


def _run(
    recipe: "QuantRecipe",
    plan: "QuantPlan",
    output: Path,
    where: Any,
    executor: str,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    import time
    from contextlib import ExitStack

    from wtool import console

    from .allocate_cli import drop_statistics
    from .run import calibration, run_quantization

    plan.plan.check()
    begin = time.perf_counter()
    windows = calibration(recipe, plan, trust_remote_code=where.trust_remote_code)
    for warning in plan.plan.warnings:
        console.warn(warning)
    if windows:
        options.tell(windows, quiet)
    with ExitStack() as stack:

        def start(steps: int) -> Any:
            unit = "batches" if windows else "bytes"
            return stack.enter_context(console.progress("quantizing", steps, quiet=quiet, unit=unit))

        outcome = run_quantization(
            recipe, plan, output, windows=windows, where=where, executor=executor, force=force, start=start
        )
    if current().leads:
        drop_statistics(output)
        _tell(plan, output, outcome, time.perf_counter() - begin, as_json)


def _tell(plan: "QuantPlan", output: Path, outcome: "Outcome", seconds: float, as_json: bool) -> None:
    import json

    from wtool.console import emit, emit_json, human_bytes
    from wtool.writer import MANIFEST

    from .allocate_cli import ABOUT, show_allocation

    summary = plan.plan.about["summary"]
    spread = {ABOUT: plan.plan.about[ABOUT]} if ABOUT in plan.plan.about else {}
    report = json.loads((output / MANIFEST).read_bytes()).get("report", {})
    fallbacks = {name: entry["fallback"] for name, entry in report.items() if "fallback" in entry}
    if as_json:
        emit_json(
            {
                "output": str(output),
                "already_there": outcome.already_there,
                "resumed_bytes": outcome.resumed_bytes,
                **summary,
                **spread,
                "fallbacks": fallbacks,
                "report": report,
                "seconds": round(seconds, 3),
                "warnings": list(plan.plan.warnings),
            }
        )
        return
    if outcome.already_there:
        emit(f"{output}: there already, made by this recipe from these inputs; nothing to do (--force makes it anew)")
        return
    resumed = f", {human_bytes(outcome.resumed_bytes)} of it from the run before" if outcome.resumed_bytes else ""
    sizes = f"{human_bytes(summary['bytes_before'])} became {human_bytes(summary['bytes_after'])}"
    emit(
        f"{output}: {summary['layers']} linear layers to {summary['bits_per_weight']:.2f} bits, "
        f"{sizes} in {seconds:.1f} s{resumed}"
    )
    show_allocation(plan)
    _worst(report)
    for name, reason in fallbacks.items():
        emit(f"rounded only: {name}: {reason}")


def _worst(report: dict[str, Any]) -> None:
    """The layers whose outputs moved most."""
    from wtool.console import table

    known = {name: entry for name, entry in report.items() if entry.get("output_error") is not None}
    if not known:
        return
    worst = sorted(known, key=lambda name: -known[name]["output_error"])[:5]
    rows = [
        [name, *(f"{known[name][key]:.4f}" for key in ("output_error", "rtn_output_error", "weight_error"))]
        for name in worst
    ]
    table("the layers whose outputs changed most", ["layer", "output error", "by rounding", "weight error"], rows)
