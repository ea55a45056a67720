"""`wtool prune`: options or a YAML file -> recipe -> plan -> run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError

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
    size: Annotated[str | None, typer.Option(help="find sizes whose weights take at most that (120MB, 2GB)")] = None,
    latency_ratio: Annotated[
        float | None, typer.Option(help="find sizes with at most that share of a token's work (0.8), in (0, 1]")
    ] = None,
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
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="share of the weights to drop, in [0, 1); several make a folder each, from one calibration"),
    ] = None,
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
    lift: Annotated[
        bool | None,
        typer.Option(
            help="sparsegpt, svd-llm: count short tokens, as the first is, like one of usual length [default: yes]"
        ),
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="store a bit for every weight and those that stay")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="modules to leave as they are")] = None,
    sequential: Annotated[
        bool | None, typer.Option(help="fit each linear to what the pruned ones before it feed it [default: yes]")
    ] = None,
    recover: Annotated[str | None, typer.Option(help="then train it on the text: distill or lora")] = None,
    recover_tokens: Annotated[int, typer.Option(min=1, help="tokens to learn from")] = 1_000_000,
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
    """Make a checkpoint smaller or sparse, streamed block by block."""
    dry_run = dry_run or sketch is not None
    if output is None and not dry_run:
        raise UsageError("where to? give the output folder with -o OUT (or --dry-run to see the plan)")
    from wtool.console import parse_size
    from wtool.recipe_file import asked, given

    from .recipe import PruneRecipe

    calibration = {"data": calib or None, "samples": samples, "seqlen": seqlen, "seed": seed}
    calibration |= {"text_column": text_column, "split": split}
    flags: dict[str, Any] = {
        "layers": None if layers is None else options.layers("--layers", layers),
        "ffn": ffn,
        "heads": heads,
        "kv_heads": kv_heads,
        "hidden": hidden,
        "experts": experts,
        "expert_ffn": expert_ffn,
        "params": None if params is None else _count(params),
        "size": None if size is None else parse_size(size),
        "latency_ratio": latency_ratio,
        "depth_score": depth_score,
        "expert_score": expert_score,
        "compensate": compensate,
        "rescale_norms": rescale_norms,
        "rotate": rotate,
        "method": method,
        "sparsity": sparsity[0] if sparsity else None,
        "pattern": pattern,
        "layer_ratios": layer_ratios,
        "rank_ratio": rank_ratio,
        "ranks": ranks,
        "factors": False if multiply else None,
        "bits": bits,
        "group_size": group_size,
        "damping": damping,
        "lift": lift,
        "pack": pack or None,
        "ignore": ignore or None,
        "way": None if sequential is None else "sequential" if sequential else "one-pass",
        "calibration": given(calibration) or None,
        "statistics": stats,
    }
    recipe = asked(PruneRecipe, "prune", "model", model, given(flags))
    shard = parse_size(shard_size)
    from .job import Job, show
    from .stages import several, with_recovery

    if dry_run:
        raise typer.Exit(show(recipe, shard, sketch, as_json))
    assert output is not None
    where = options.where(device, compute_dtype, activations, batch_tokens, trust_remote_code)
    job = Job(shard, where, force, as_json, quiet, low_disk)
    if sparsity and len(sparsity) > 1:
        if recover:
            raise UsageError("--recover trains one result: give one --sparsity")
        several(job, recipe, sparsity, output, given(calibration))
    elif recover:
        with_recovery(job, recipe, output, recover, recover_tokens, given(calibration))
    else:
        job.run(recipe, output)


def _count(text: str) -> int:
    """A number of parameters: 1.2B, 90M, 500000."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    unit = units.get(text[-1:].upper(), 1)
    try:
        return int(float(text if unit == 1 else text[:-1]) * unit)
    except ValueError:
        raise UsageError(f"--params '{text}': give a number of parameters, such as 1.2B or 90M") from None
