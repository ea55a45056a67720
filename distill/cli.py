"""`wtool distill` and `wtool teacher-cache`: options or a YAML file -> recipe -> plan -> run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError

from .cache_cli import cache_app as cache_app

if TYPE_CHECKING:
    from .planner import DistillPlan

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
The student is a second checkpoint, or --student-layers (15: so many of the teacher's, evenly spaced; 0,2,5: these), or
--student-config (random weights). TEACHER may be a folder that `wtool teacher-cache` made; it brings its own text.
Losses: forward-kl, reverse-kl, jsd, skew-kl, skew-reverse-kl, tvd, uld.
Optimizers: adamw, adamw-8bit, adafactor, sgd, lion, lion-8bit, muon, and those of transformers by its names.
Schedules: cosine, linear, constant, one_cycle, reduce_lr_on_plateau, and those of transformers.
Many devices: accelerate launch --config_file FILE -m wtool distill …
A stopped training goes on from its last checkpoint when the same command is run again."""


def _number(help: str, minimum: float | None = None) -> Any:
    return typer.Option(help=help, min=minimum)


@app.command(epilog=EPILOG)
def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="checkpoint, cache, or a recipe file (YAML)")],
    student: Annotated[str | None, typer.Argument(metavar="[STUDENT]", help="checkpoint to train")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
    student_layers: Annotated[str | None, typer.Option(help="make the student of these layers of the teacher")] = None,
    student_config: Annotated[str | None, typer.Option(help="config.json of a student with random weights")] = None,
    data: Annotated[list[str] | None, typer.Option(help="text: files, datasets of the Hub")] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(help="text to judge by [default: held out of the other]")
    ] = None,
    samples: Annotated[int | None, _number("windows of text [default: as many as needed]", 2)] = None,
    seqlen: Annotated[int | None, _number("tokens of a window [default: 1024]", 2)] = None,
    held_out: Annotated[int | None, _number("windows to judge by, never trained on [default: 16]", 1)] = None,
    separate: Annotated[bool, typer.Option("--separate", help="no attention between documents of a window")] = False,
    assistant_only: Annotated[
        bool, typer.Option("--assistant-only", help="of conversations, learn what the assistant says alone")
    ] = False,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    loss: Annotated[str | None, typer.Option("--loss", "-l", help="[default: forward-kl]")] = None,
    temperature: Annotated[float | None, _number("of both distributions [default: 1]")] = None,
    beta: Annotated[float | None, _number("of jsd: 0 is forward KL, 1 reverse KL [default: 0.5]")] = None,
    alpha: Annotated[float | None, _number("of the skew losses [default: 0.1]")] = None,
    kd: Annotated[float | None, _number("weight of the loss [default: 1]", 0)] = None,
    ce: Annotated[float | None, _number("weight of the cross-entropy with the text [default: 0]", 0)] = None,
    hidden: Annotated[str | None, typer.Option(help="compare hidden states too: mse or cosine")] = None,
    hidden_weight: Annotated[float | None, _number("weight of that [default: 1]", 0)] = None,
    relations: Annotated[
        float | None, _number("weight of how tokens relate in the last layer's attention [default: 0]", 0)
    ] = None,
    steps: Annotated[int | None, _number("steps of the optimizer", 1)] = None,
    epochs: Annotated[float | None, _number("times over the text [default: 1]", 0)] = None,
    tokens: Annotated[int | None, _number("tokens to learn from", 1)] = None,
    batch: Annotated[int | None, _number("windows a forward on each device [default: 4]", 1)] = None,
    accumulation: Annotated[int | None, _number("forwards a step [default: 1]", 1)] = None,
    optimizer: Annotated[str | None, typer.Option(help="[default: adamw]")] = None,
    optimizer_arg: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="for the optimizer")] = None,
    schedule: Annotated[str | None, typer.Option(help="of the learning rate [default: cosine]")] = None,
    warmup: Annotated[float | None, _number("share of the steps [default: 0.05]", 0)] = None,
    lr: Annotated[float | None, _number("highest learning rate [default: 1e-4]", 0)] = None,
    weight_decay: Annotated[float | None, _number("[default: 0]", 0)] = None,
    clip: Annotated[float | None, _number("largest norm of the gradient, 0 for any [default: 1]", 0)] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="compute activations twice instead of keeping them")
    ] = False,
    precision: Annotated[str | None, typer.Option(help="float32, mixed or bfloat16 [default: by device]")] = None,
    evaluate_every: Annotated[int | None, _number("steps [default: a tenth of all]", 1)] = None,
    patience: Annotated[int | None, _number("stop after so many evaluations without a better one", 1)] = None,
    on_policy: Annotated[float | None, _number("share of batches that the student writes [default: 0]", 0)] = None,
    lora: Annotated[int | None, _number("train factors of this rank beside the weights", 1)] = None,
    lora_alpha: Annotated[float | None, _number("[default: twice the rank]", 0)] = None,
    lora_target: Annotated[list[str] | None, typer.Option(help="ends of module names [default: all linear]")] = None,
    keep_adapter: Annotated[bool, typer.Option("--keep-adapter", help="write the adapter alone")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="keep the student's weights in 4 bits meanwhile")] = False,
    teacher_4bit: Annotated[bool, typer.Option("--teacher-4bit", help="by bitsandbytes")] = False,
    stream_teacher: Annotated[
        bool, typer.Option("--stream-teacher", help="one block in memory at a time; slow, see teacher-cache")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="of all that is random [default: 0]")] = None,
    tensorboard: Annotated[str | None, typer.Option(metavar="FOLDER", help="for TensorBoard's files")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    force: options.Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and every problem; train nothing")] = False,
    sketch: options.Sketch = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a student to say what its teacher says."""
    dry_run = dry_run or sketch is not None
    if output is None and not dry_run:
        raise UsageError("where to? give the output folder with -o OUT (or --dry-run to see the plan)")
    told = locals()
    from wtool.recipe_file import asked, given, named_value

    def named(*names: str, **renamed: str) -> dict[str, Any] | None:
        pairs = {**{name: name for name in names}, **renamed}
        found = {key: told[name] for key, name in pairs.items() if told[name] or type(told[name]) in (int, float)}
        return found or None

    training = named(
        *("steps", "epochs", "tokens", "batch", "accumulation", "optimizer", "schedule", "warmup", "lr", "clip"),
        *("weight_decay", "checkpointing", "precision", "evaluate_every", "patience", "on_policy", "seed"),
        "tensorboard",
    )
    arguments = dict(named_value("--optimizer-arg", text) for text in optimizer_arg or [])
    factors = named("keep_adapter", rank="lora", alpha="lora_alpha", targets="lora_target", four_bit="qlora")
    if factors and lora is None:
        raise UsageError("--lora RANK is missing: the other options of LoRA mean nothing without it")
    flags = {
        "student": student,
        "student_layers": None if student_layers is None else options.layers("--student-layers", student_layers),
        "student_config": student_config,
        "data": named(
            *("samples", "seqlen", "seed", "text_column", "split", "held_out", "separate"),
            "assistant_only",
            sources="data",
            held_out_sources="eval_data",
        ),
        "loss": named("temperature", "beta", "alpha", "kd", "ce", "hidden", "hidden_weight", "relations", kind="loss"),
        "training": ({**(training or {}), "optimizer_arguments": arguments} if arguments else training),
        "lora": factors,
        "teacher_4bit": teacher_4bit or None,
        "stream_teacher": stream_teacher or None,
    }
    from wtool.loading import pick_device

    from .export import sketch_student
    from .planner import plan_distillation
    from .recipe import DistillRecipe

    recipe = asked(DistillRecipe, "distill", "teacher", teacher, given(flags))
    chosen = pick_device(device).partition(":")[0]
    plan = plan_distillation(recipe, device=chosen, headers_only=dry_run, trust_remote_code=trust_remote_code)
    if dry_run:
        if sketch is not None:
            sketch_student(plan, sketch)
        return _show(plan, as_json)
    assert output is not None
    _run(plan, output, force, trust_remote_code, as_json, quiet)


def _show(plan: "DistillPlan", as_json: bool) -> None:
    from wtool.console import emit, emit_json

    from .planner import describe

    if as_json:
        return emit_json(plan.summary())
    for line in (*describe(plan), *(f"warning: {warning}" for warning in plan.texts.warnings), "no problem found"):
        emit(line)


def _run(plan: "DistillPlan", output: Path, force: bool, trust_remote_code: bool, as_json: bool, quiet: bool) -> None:
    import os

    from wtool import console

    from .run import run_distillation

    first = int(os.environ.get("RANK", "0")) == 0
    quiet = quiet or not first
    for warning in plan.texts.warnings if first else ():
        console.warn(warning)
    for remark in () if quiet else plan.texts.remarks:
        console.remark(remark)
    with console.progress("distilling", plan.steps, quiet=quiet, unit="steps") as progress:
        outcome = run_distillation(plan, output, force=force, trust_remote_code=trust_remote_code, progress=progress)
    if first:
        _tell(plan, output, outcome, as_json)


def _tell(plan: "DistillPlan", output: Path, outcome: Any, as_json: bool) -> None:
    import json

    from wtool.console import emit, emit_json, table
    from wtool.writer import MANIFEST

    told = json.loads((output / MANIFEST).read_bytes())
    rate = outcome.tokens / outcome.seconds if outcome.seconds and outcome.tokens else None
    if as_json:
        times = {"seconds": round(outcome.seconds, 3), "tokens_per_second": rate, "steps": plan.steps}
        done = {"already_there": outcome.already_there, "resumed_steps": outcome.resumed_steps, **times}
        return emit_json({"output": str(output), **done, **{key: told[key] for key in FIGURES if key in told}})
    if outcome.already_there:
        return emit(f"{output}: there already, made by this recipe from these inputs; nothing to do (--force: anew)")
    resumed = f", {outcome.resumed_steps} of the steps from the run before" if outcome.resumed_steps else ""
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    emit(f"{output}: {plan.steps} steps in {outcome.seconds:.1f} s{speed}{resumed}; kept is step {told['best_step']}")
    rows = [
        [str(entry["step"]), *(f"{entry[key]:.4f}" for key in ("kl", "ce", "perplexity")), f"{entry['tokens']:,}"]
        for entry in told["evaluation"]
    ]
    best = next((row for row, entry in enumerate(told["evaluation"]) if entry["step"] == told["best_step"]), None)
    table("held-out text", ["step", "KL", "cross-entropy", "perplexity", "tokens"], rows, best=best)


FIGURES = ("evaluation", "training", "best_step")
