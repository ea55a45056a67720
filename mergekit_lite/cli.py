"""`wtool merge`: options or a YAML file -> recipe -> plan -> run."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from wtool import options

from . import stages_cli
from .flags import recipe_asked
from .job import Job, check_output, merge_models
from .regmean import cli as regmean_cli
from .soups import greedy_cli

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
\b
Methods
  of weights:        linear, slerp (-t), nuslerp, multislerp, karcher, passthrough
  of task vectors (with --base):
                     task_arithmetic, model_stock, nearswap (-t), arcee_fusion, sce, ram, ramplus_tl
    trimmed:         ties, breadcrumbs, breadcrumbs_ties (--density)
    dropped at random: dare_linear, dare_ties, della, della_linear (--density, --seed)
  of inputs:         regmean, regmean++ (--calib)

--weight and --density are given once for all models, or once a model, in their order. What else a method takes:
-p NAME=VALUE.

A stopped merge goes on where it was when the same command is run again."""


@app.command(epilog=EPILOG)
def merge(
    models: Annotated[list[str], typer.Argument(help="checkpoints to merge, or one recipe file (mergekit's YAML)")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="merge method [default: linear]")] = None,
    base: Annotated[str | None, typer.Option("--base", help="checkpoint the models were fine-tuned from")] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", "-w", help="factor of a model")] = None,
    density: Annotated[list[float] | None, typer.Option(help="share of a task vector to keep, 0 to 1")] = None,
    t: Annotated[
        float | None, typer.Option("-t", help="slerp: 0 is the first model, 1 the second; nearswap: how far")
    ] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="factor of the merged task vector")] = None,
    scale: Annotated[float | None, typer.Option(help="passthrough: factor of the model")] = None,
    normalize: Annotated[bool | None, typer.Option(help="divide by the weights that take part")] = None,
    rescale: Annotated[
        str | None, typer.Option(help="dare, della: density, l1 or none; ties, breadcrumbs: l1 or none")
    ] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="any other of the method")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="type of the output: bfloat16, float16, float32")] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="nearest, or stochastic: keeps changes too small for 16 bits (default for model_stock)"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of random masks and random rounding")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="union|base|MODEL", help="whose tokens the output has, where models differ")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, chatml, llama3, alpaca, mistral or exaone")
    ] = None,
    greedy: greedy_cli.Texts = None,
    window: greedy_cli.Window = None,
    stride: greedy_cli.Stride = None,
    limit_tokens: greedy_cli.LimitTokens = None,
    batch: greedy_cli.Batch = None,
    calib: regmean_cli.Calib = None,
    samples: regmean_cli.Samples = None,
    seqlen: regmean_cli.Seqlen = None,
    text_column: regmean_cli.TextColumn = None,
    split: regmean_cli.Split = None,
    stats: regmean_cli.Stats = None,
    activations: options.Activations = "device",
    batch_tokens: options.BatchTokens = 2048,
    device: options.Device = "auto",
    compute_dtype: options.ComputeDtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    shard_size: Annotated[str, typer.Option(help="largest output file")] = "5GB",
    workers: Annotated[int | None, typer.Option(min=1, help="threads [default: processors + 1]")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="results that may be in memory at a time, e.g. 2GB")
    ] = None,
    executor: options.Executor = "local",
    low_disk: options.LowDisk = False,
    force: Annotated[bool, typer.Option("--force", help="replace the output if it is there")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the plan and every problem; read no weights")
    ] = False,
    sketch: options.Sketch = None,
    keep_stages: stages_cli.KeepStages = False,
    ignore_tokenizers: Annotated[bool, typer.Option("--ignore-tokenizers", help="merge unlike vocabularies")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="write NaN and infinity")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no remarks")] = False,
) -> None:
    """Merge checkpoints into one, streamed tensor by tensor."""
    from wtool.console import parse_size
    from wtool.recipe_file import named_value

    dry_run = dry_run or sketch is not None
    check_output(output, dry_run)
    flags: dict[str, Any] = {
        "merge_method": method,
        "base_model": base,
        "dtype": dtype,
        "rounding": rounding,
        "tokenizer_source": tokenizer,
        "chat_template": chat_template,
        "seed": seed or None,
        "weight": weight or None,
        "density": density or None,
        "t": t,
        "lambda": lambda_,
        "scale": scale,
        "normalize": normalize,
        "rescale": rescale,
        **dict(named_value("--parameter", text) for text in parameter or []),
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    room = parse_size(memory) if memory else None
    job = Job(
        output,
        dry_run,
        sketch,
        executor,
        low_disk,
        settings={"ignore_tokenizers": ignore_tokenizers, "max_shard_bytes": parse_size(shard_size)},
        run={"workers": workers, "memory": room, "force": force, "allow_nonfinite": allow_nonfinite},
        as_json=as_json,
        quiet=quiet,
    )
    text = {"data": calib, "samples": samples, "seqlen": seqlen, "text_column": text_column, "split": split}
    soup = greedy_cli.asked(
        greedy,
        window=window,
        stride=stride,
        limit_tokens=limit_tokens,
        batch=batch,
        device=device,
        compute_dtype=compute_dtype,
        trust_remote_code=trust_remote_code,
    )
    if on_inputs := regmean_cli.asked(models, text, stats, flags):
        place = partial(options.where, device, compute_dtype, activations, batch_tokens, trust_remote_code)
        return regmean_cli.merge(on_inputs, job, place, greedy=soup)
    if staged := stages_cli.asked(models, flags):
        return stages_cli.merge(staged, models[0], job, keep=keep_stages, greedy=soup)
    stages_cli.check(keep_stages)
    recipe = recipe_asked(models, flags)
    if soup:
        greedy_cli.merge(recipe, soup, job)
    else:
        merge_models(recipe, job)
