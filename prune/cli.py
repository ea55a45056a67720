"""`wtool prune`: options or a YAML file -> recipe -> plan -> run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.executors.local import Outcome
    from wtool.plan import Plan

    from .recipe import PruneRecipe

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
Structure: the sizes to keep. The result is a smaller model that plain transformers loads.
Methods: magnitude, wanda, ria, sparsegpt set weights to zero, so that size and speed stay as they are (--pack makes the
files smaller); svd, svd-llm make matrices products of thin ones. magnitude and svd need no text.
Patterns: 2:4 keeps 2 of every 4 neighbours. A stopped pruning goes on where it was."""


@app.command(epilog=EPILOG)
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint to prune, or a recipe file (YAML)")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
    layers: Annotated[str | None, typer.Option(help="layers to keep: how many, or which (0,1,2,5)")] = None,
    ffn: Annotated[int | None, typer.Option(help="channels of each feed-forward block to keep")] = None,
    heads: Annotated[int | None, typer.Option(help="query heads to keep")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="key-value heads to keep, with their query heads")] = None,
    hidden: Annotated[int | None, typer.Option(help="channels of the residual stream to keep")] = None,
    experts: Annotated[int | None, typer.Option(help="experts of each layer to keep")] = None,
    expert_ffn: Annotated[int | None, typer.Option(help="channels inside each expert to keep")] = None,
    params: Annotated[str | None, typer.Option(help="find sizes of at most so many parameters (1.2B, 90M)")] = None,
    depth_score: Annotated[
        str | None, typer.Option(help="perplexity, block-influence, angular or last [default: perplexity]")
    ] = None,
    expert_score: Annotated[str | None, typer.Option(help="reap or frequency [default: reap]")] = None,
    compensate: Annotated[
        bool | None, typer.Option(help="fit what reads pruned channels to what is left of them [default: yes]")
    ] = None,
    rescale_norms: Annotated[
        bool | None, typer.Option(help="after hidden channels went, by the measured ratio [default: yes]")
    ] = None,
    rotate: Annotated[
        bool | None, typer.Option(help="the residual stream into its principal directions first [default: no]")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="magnitude, wanda, ria, sparsegpt, svd, svd-llm")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="share of the weights to drop, in [0, 1)")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, N kept of every M neighbours in a row")] = None,
    layer_ratios: Annotated[
        str | None, typer.Option(help="how sparsity is shared out: uniform, owl, by-shape [default: uniform]")
    ] = None,
    rank_ratio: Annotated[float | None, typer.Option(help="share of the parameters to keep, in (0, 1]")] = None,
    ranks: Annotated[str | None, typer.Option(help="how ranks are shared out: energy, uniform")] = None,
    multiply: Annotated[bool, typer.Option("--multiply", help="store the product of the thin matrices")] = False,
    bits: Annotated[int | None, typer.Option("--bits", "-b", help="sparsegpt: round what stays as well")] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", "-g", help="inputs that share a scale; -1: a row [default: 128]")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="share of the mean diagonal to add [default: 0.01]")] = None,
    pack: Annotated[bool, typer.Option("--pack", help="store a bit for every weight and those that stay")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="modules to leave as they are")] = None,
    sequential: Annotated[
        bool | None, typer.Option(help="fit each linear to what the pruned ones before it feed it [default: no]")
    ] = None,
    calib: options.Calib = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    stats: Annotated[str | None, typer.Option(help="folder of `wtool calibrate`, in the place of text")] = None,
    device: options.Device = "auto",
    compute_dtype: options.ComputeDtype = "auto",
    activations: options.Activations = "device",
    batch_tokens: options.BatchTokens = 2048,
    shard_size: Annotated[str, typer.Option(help="largest output file")] = "5GB",
    force: options.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the plan and every problem; read no weights")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a checkpoint smaller or sparse, streamed block by block."""
    if output is None and not dry_run:
        raise UsageError("where to? give the output folder with -o OUT (or --dry-run to see the plan)")
    from wtool.console import parse_size

    calibration = {"data": calib or None, "samples": samples, "seqlen": seqlen, "seed": seed}
    calibration |= {"text_column": text_column, "split": split}
    flags: dict[str, Any] = {
        "layers": None if layers is None else _layers(layers),
        "ffn": ffn,
        "heads": heads,
        "kv_heads": kv_heads,
        "hidden": hidden,
        "experts": experts,
        "expert_ffn": expert_ffn,
        "params": None if params is None else _count(params),
        "depth_score": depth_score,
        "expert_score": expert_score,
        "compensate": compensate,
        "rescale_norms": rescale_norms,
        "rotate": rotate,
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "layer_ratios": layer_ratios,
        "rank_ratio": rank_ratio,
        "ranks": ranks,
        "factors": False if multiply else None,
        "bits": bits,
        "group_size": group_size,
        "damping": damping,
        "pack": pack or None,
        "ignore": ignore or None,
        "way": None if sequential is None else "sequential" if sequential else "one-pass",
        "calibration": _given(calibration) or None,
        "statistics": stats,
    }
    recipe = _recipe(model, _given(flags))
    shard = parse_size(shard_size)
    if dry_run:
        raise typer.Exit(_show(recipe, shard, as_json))
    assert output is not None
    where = options.where(device, compute_dtype, activations, batch_tokens, trust_remote_code)
    _run(recipe, shard, output, where, force, as_json, quiet)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}


def _layers(text: str) -> int | list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UsageError(f"--layers '{text}': give how many layers to keep, or their numbers with commas: 0,1,2,5")
    return int(parts[0]) if len(parts) == 1 and "," not in text else [int(part) for part in parts]


def _count(text: str) -> int:
    """A number of parameters: 1.2B, 90M, 500000."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    unit = units.get(text[-1:].upper(), 1)
    try:
        return int(float(text if unit == 1 else text[:-1]) * unit)
    except ValueError:
        raise UsageError(f"--params '{text}': give a number of parameters, such as 1.2B or 90M") from None


def _recipe(model: str, flags: dict[str, Any]) -> "PruneRecipe":
    from .recipe import parse_recipe, read_recipe

    if model.endswith((".yml", ".yaml")):
        if flags:
            raise UsageError(
                f"{model}: a recipe file tells everything; '{next(iter(flags))}' cannot be given beside it"
            )
        return read_recipe(Path(model))
    return parse_recipe({"model": model, **flags}, "command line")


def _show(recipe: "PruneRecipe", shard: int, as_json: bool) -> int:
    """Print a plan; the exit code tells whether it can be carried out."""
    from wtool.console import emit, emit_json

    from .planner import open_source, plan_matrices

    source, statistics = open_source(recipe, headers_only=True)
    if recipe.kind == "structure":
        from .structural import plan_sizes

        plan = plan_sizes(recipe, source, max_shard_bytes=shard)
    else:
        plan = plan_matrices(recipe, source, statistics, max_shard_bytes=shard).plan
    if as_json:
        emit_json({**plan.summary(1), **plan.about["summary"]})
        return 3 if plan.problems else 0
    emit(f"{recipe.model}: {_in_words(recipe, plan)}")
    for warning in plan.warnings:
        emit(f"warning: {warning}")
    for problem in plan.problems:
        emit(f"problem: {problem}")
    emit("this plan cannot be carried out" if plan.problems else "no problem found")
    return 3 if plan.problems else 0


def _in_words(recipe: "PruneRecipe", plan: "Plan") -> str:
    from wtool.console import human_bytes

    told = plan.about["summary"]
    sizes = f"{human_bytes(told['bytes_before'])} become {human_bytes(told['bytes_after'])}"
    if recipe.kind == "structure":
        changes = ", ".join(f"{name} {before} to {after}" for name, (before, after) in told["sizes"].items())
        return f"{changes}; {told['params_before']:,} parameters become {told['params_after']:,}, {sizes}"
    if recipe.kind == "rank":
        return f"{told['layers']} layers by {recipe.method} hold {told['ratio']:.1%} of their numbers; {sizes}"
    same = (
        ""
        if recipe.pack or recipe.bits
        else ": zeros take as much room and time as other numbers (--pack makes the files smaller)"
    )
    return (
        f"{told['dropped']:,} of {told['weights']:,} weights of {told['layers']} layers ({told['sparsity']:.2%}) "
        f"dropped by {recipe.method}, {recipe.asked}; {sizes}{same}"
    )


def _run(
    recipe: "PruneRecipe", shard: int, output: Path, where: "Where", force: bool, as_json: bool, quiet: bool
) -> None:
    import time
    from collections.abc import Callable
    from contextlib import ExitStack

    from wtool import console
    from wtool.calibration_data.for_model import windows_asked

    from .planner import open_source, plan_matrices
    from .run import found_out, needs_text, run_matrices

    begin = time.perf_counter()
    source, statistics = open_source(recipe)
    windows = None
    if needs_text(recipe):
        windows = windows_asked(source, recipe.calibration, trust_remote_code=where.trust_remote_code)
        options.tell(windows, quiet)
    with ExitStack() as stack:

        def start(what: str, steps: int) -> Callable[[int], None]:
            stack.close()
            unit = "bytes" if windows is None else "batches"
            return stack.enter_context(console.progress(what, steps, quiet=quiet, unit=unit))

        if recipe.kind == "structure":
            from .structural import run_sizes

            plan, outcome = run_sizes(recipe, source, output, windows, where, start, force=force, shard=shard)
        else:
            found = found_out(recipe, source, statistics, windows, where, start)
            made = plan_matrices(recipe, source, statistics, found, max_shard_bytes=shard)
            for warning in () if quiet else made.plan.warnings:
                console.warn(warning)
            outcome = run_matrices(recipe, made, output, windows=windows, where=where, force=force, start=start)
            plan = made.plan
    _tell(recipe, plan, outcome, output, time.perf_counter() - begin, as_json)


def _tell(recipe: "PruneRecipe", plan: "Plan", outcome: "Outcome", output: Path, seconds: float, as_json: bool) -> None:
    import json

    from wtool.console import emit, emit_json, human_bytes
    from wtool.writer import MANIFEST

    report = json.loads((output / MANIFEST).read_bytes()).get("report", {})
    fallbacks = {name: entry["fallback"] for name, entry in report.items() if "fallback" in entry}
    if as_json:
        emit_json(
            {
                "output": str(output),
                "already_there": outcome.already_there,
                "resumed_bytes": outcome.resumed_bytes,
                **plan.about["summary"],
                "fallbacks": fallbacks,
                "report": report,
                "seconds": round(seconds, 3),
                "warnings": list(plan.warnings),
            }
        )
        return
    if outcome.already_there:
        emit(f"{output}: there already, made by this recipe from these inputs; nothing to do (--force makes it anew)")
        return
    resumed = f", {human_bytes(outcome.resumed_bytes)} of it from the run before" if outcome.resumed_bytes else ""
    emit(f"{output}: {_in_words(recipe, plan)}; {seconds:.1f} s{resumed}")
    for name, reason in fallbacks.items():
        emit(f"not by {recipe.method}: {name}: {reason}")
