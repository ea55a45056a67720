"""What other verbs do before and after a pruning, called by their names as a user would call them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wtool import console
from wtool.cli import load
from wtool.errors import OutputExists, UsageError
from wtool.recipe_parts import known

from .job import Job, in_words
from .recipe import PruneRecipe, parse_recipe
from .run import needs_text

RECOVERIES: dict[str, str] = {
    "distill": "train all weights to say what the model said before",
    "lora": "the same by factors of rank 16 beside the weights, merged at the end",
}
RANK = 16


def beside(out: Path, what: str) -> Path:
    """Where something that is needed meanwhile lies."""
    return out.absolute().parent / f".{out.name}.{what}"


def several(job: Job, recipe: PruneRecipe, shares: Sequence[float], output: Path, calibration: dict[str, Any]) -> None:
    """Prune to several shares, from statistics of the model as it is that are gathered once.

    calibration: as the recipe has it, what was given alone
    raises: WtoolError
    """
    content, folder = recipe.model_dump(), beside(output, "statistics")
    if needs_text(recipe):
        names = {"data": "calib", "text_column": "text-column"}
        flags = [*_flags(job), *(["--force"] if job.force else []), *(["--lift"] if recipe.lifts else [])]
        call("calibrate", [recipe.model, "-o", str(folder), *_options(calibration, names), *flags])
        content["statistics"] = str(folder)
    for share in shares:
        job.run(parse_recipe(content | {"sparsity": share}, "command line"), output / str(share))
    shutil.rmtree(folder, ignore_errors=True)


def with_recovery(
    job: Job, recipe: PruneRecipe, output: Path, how: str, tokens: int, calibration: dict[str, Any]
) -> None:
    """Prune, and distil the model from before into what is left.

    how: one of RECOVERIES
    tokens: to learn from
    raises: WtoolError
    """
    known("recovery", how, RECOVERIES)
    if recipe.kind != "structure":
        raise UsageError("--recover trains all weights, zeros too: it goes with sizes to keep, not with a method")
    if output.exists() and not job.force:
        raise OutputExists(f"{output}: there already; --force replaces it")
    student = beside(output, "pruned")
    plan, _, seconds = job.carry_out(recipe, student)
    console.remark(f"{in_words(recipe, plan)}; {seconds:.1f} s")
    text = {key: value for key, value in calibration.items() if key != "samples"}
    arguments = [recipe.model, str(student), "-o", str(output), "--tokens", str(tokens)]
    arguments += _options(text, {"text_column": "text-column"})
    arguments += ["--lora", str(RANK)] if how == "lora" else []
    arguments += [*(["--force"] if job.force else []), *(["--json"] if job.as_json else [])]
    call("distill", [*arguments, *_flags(job)])
    shutil.rmtree(student)


def call(verb: str, arguments: Sequence[str]) -> None:
    """Carry out another verb.

    raises: WtoolError
    """
    code = load(verb)(args=list(arguments), prog_name=f"wtool {verb}", standalone_mode=False)
    if isinstance(code, int) and code:
        raise UsageError(f"wtool {verb} {' '.join(arguments)}: ended with {code}")


def _flags(job: Job) -> list[str]:
    trusted = ["--trust-remote-code"] if job.where.trust_remote_code else []
    return ["--device", job.where.device, *trusted, *(["--quiet"] if job.quiet else [])]


def _options(given: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Values as options of a command line."""
    options: list[str] = []
    for key, value in given.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            options += [f"--{names.get(key, key)}", str(each)]
    return options
