"""`wtool merge`: options or a YAML file -> recipe -> plan -> run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError

from . import greedy_cli, regmean_cli, stages_cli

if TYPE_CHECKING:
    from wtool.executors.local import Outcome
    from wtool.plan import Plan

    from .recipe import MergeRecipe

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
    seed: Annotated[int, typer.Option(help="of random masks")] = 0,
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
    from wtool.recipe_file import named_value

    dry_run = dry_run or sketch is not None
    if output is None and not dry_run:
        raise UsageError("where to? give the output folder with -o OUT (or --dry-run to see the plan)")
    flags: dict[str, Any] = {
        "merge_method": method,
        "base_model": base,
        "dtype": dtype,
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
    from wtool.console import parse_size

    text = {"data": calib, "samples": samples, "seqlen": seqlen, "text_column": text_column, "split": split}
    if on_inputs := regmean_cli.asked(models, text, stats, flags):
        regmean_cli.check(executor, low_disk, greedy)
        job = regmean_cli.Job(
            lambda: options.where(device, compute_dtype, activations, batch_tokens, trust_remote_code),
            settings={"ignore_tokenizers": ignore_tokenizers, "max_shard_bytes": parse_size(shard_size)},
            run={"workers": workers, "memory": parse_size(memory) if memory else None, "force": force}
            | {"allow_nonfinite": allow_nonfinite},
            as_json=as_json,
            quiet=quiet,
        )
        if dry_run:
            raise typer.Exit(regmean_cli.show(on_inputs, job, sketch))
        assert output is not None
        return regmean_cli.merge(on_inputs, output, job)
    from wtool.executors import chosen

    from .planner import plan_merge

    flags = {key: value for key, value in flags.items() if value is not None}
    staged = stages_cli.asked(models, flags)
    recipe = staged.output if staged else _recipe(models, flags)
    settings: dict[str, Any] = {"ignore_tokenizers": ignore_tokenizers, "max_shard_bytes": parse_size(shard_size)}
    make = partial(plan_merge, recipe, **settings)
    room = parse_size(memory) if memory else None
    how: dict[str, Any] = {"workers": workers, "memory": room, "force": force, "allow_nonfinite": allow_nonfinite}
    if keep_stages and not staged:
        raise UsageError("--keep-stages is for a recipe file of several documents; leave it out")
    if staged:
        if greedy:
            raise UsageError(f"{models[0]}: --greedy chooses among the models of one merge; leave it out")
        if dry_run:
            draw, summary = partial(options.draw, folder=sketch), partial(_summary, workers, room)
            describe = partial(_described, workers, room)
            raise typer.Exit(
                stages_cli.show(staged, draw=draw, describe=describe, summary=summary, as_json=as_json, **settings)
            )
        assert output is not None
        run, downloads = partial(chosen.run, executor, **how), partial(options.downloads, low_disk)
        make = stages_cli.make(
            staged, output, run, downloads=downloads, force=force, quiet=quiet, as_json=as_json, **settings
        )
    plan = make(headers_only=dry_run, low_disk=options.downloads(low_disk, output))
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
    if dry_run:
        options.draw(plan, sketch)
        code = _show(plan, workers, room, as_json)
        if soup and not code and not as_json:
            greedy_cli.show(recipe, plan, soup)
        raise typer.Exit(code)
    assert output is not None
    chosen.check(executor, plan)
    options.check_low_disk(low_disk, plan, executor)
    if soup:
        options.refuse_low_disk(low_disk, "--greedy")
        make = greedy_cli.search(recipe, plan, output, soup, force=force, quiet=quiet, as_json=as_json, **settings)
        plan = replace(make(), warnings=plan.warnings)
    _run(plan, output, partial(chosen.run, executor, make, **how), as_json, quiet)
    if staged:
        stages_cli.done(output, keep_stages)
    if soup:
        greedy_cli.done(output)


def _recipe(models: list[str], flags: dict[str, Any]) -> "MergeRecipe":
    from .recipe import parse_recipe, read_recipe

    if models[0].endswith((".yml", ".yaml")):
        if len(models) > 1 or flags:
            extra = models[1] if len(models) > 1 else f"--{next(iter(flags))}"
            raise UsageError(f"{models[0]}: a recipe file tells everything; '{extra}' cannot be given beside it")
        return read_recipe(Path(models[0]))
    content: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {}} for model in models],
    }
    parameters: dict[str, Any] = {}
    for key, value in flags.items():
        if key in ("merge_method", "base_model", "dtype", "seed", "tokenizer_source", "chat_template"):
            content[key] = value
        elif isinstance(value, list) and len(value) > 1:
            if len(value) != len(models):
                raise UsageError(
                    f"--{key} is given {len(value)} times for {len(models)} models; give it once, or once a model"
                )
            for entry, number in zip(content["models"], value, strict=True):
                entry["parameters"][key] = number
        else:
            parameters[key] = value[0] if isinstance(value, list) else value
    if content["merge_method"] == "ties" and parameters.get("rescale") in ("l1", "none"):
        parameters["rescale"] = parameters["rescale"] == "l1"
    return parse_recipe({**content, "parameters": parameters}, "command line")


def _show(plan: "Plan", workers: int | None, memory: int | None, as_json: bool) -> int:
    """Print a plan; the exit code tells whether it can be carried out."""
    from wtool.console import emit, emit_json

    if as_json:
        emit_json(_summary(workers, memory, plan))
    else:
        emit(_described(workers, memory, plan))
    return 3 if plan.problems else 0


def _summary(workers: int | None, memory: int | None, plan: "Plan") -> dict[str, Any]:
    from wtool.executors.budget import Budget
    from wtool.executors.local import default_workers

    Budget(memory).check(plan.steps)
    return plan.summary(workers or default_workers(), memory)


def _described(workers: int | None, memory: int | None, plan: "Plan") -> str:
    from wtool.executors.budget import Budget
    from wtool.executors.local import default_workers

    Budget(memory).check(plan.steps)
    return plan.describe(workers or default_workers(), memory)


def _run(plan: "Plan", output: Path, carry_out: Callable[..., "Outcome"], as_json: bool, quiet: bool) -> None:
    import time

    from wtool import console

    plan.check()
    for warning in plan.warnings:
        console.warn(warning)
    start = time.perf_counter()
    with console.progress("merging", sum(info.nbytes for info in plan.outputs.values()), quiet=quiet) as advance:
        outcome = carry_out(plan, output, progress=advance)
    seconds = time.perf_counter() - start
    if as_json:
        console.emit_json(
            {
                "output": str(output),
                "already_there": outcome.already_there,
                "resumed_bytes": outcome.resumed_bytes,
                "tensors": len(plan.outputs),
                "bytes": plan.bytes_to_write,
                "seconds": round(seconds, 3),
                "warnings": list(plan.warnings),
                **plan.about,
            }
        )
    elif outcome.already_there:
        console.emit(
            f"{output}: there already, made by this recipe from these inputs; nothing to do (--force makes it anew)"
        )
    else:
        resumed = (
            f", {console.human_bytes(outcome.resumed_bytes)} of it from the run before" if outcome.resumed_bytes else ""
        )
        size = console.human_bytes(plan.bytes_to_write)
        console.emit(f"{output}: {len(plan.outputs)} tensors, {size} in {seconds:.1f} s{resumed}")
