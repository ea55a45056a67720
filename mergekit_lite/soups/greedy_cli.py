"""`wtool merge --greedy`: its options, and what it prints."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wtool.errors import UsageError

from ..job import Job, check, planned, run, show

if TYPE_CHECKING:
    from wtool.plan import Plan

    from ..recipe import MergeRecipe
    from .held_out import HeldOut, How
    from .soup import Soup

log = logging.getLogger("wtool.greedy")  # under the logger that --verbose shows

Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--greedy",
        metavar="HELD.txt",
        help="greedy soup: take a model only if this text's perplexity does not rise; several texts count alike; "
        "takes the memory of one model",
    ),
]
Window = Annotated[int | None, typer.Option(min=1, help="--greedy: tokens the model sees at once [default: 1024]")]
Stride = Annotated[int | None, typer.Option(min=1, help="--greedy: tokens to the next window [default: half of it]")]
LimitTokens = Annotated[int | None, typer.Option(min=1, help="--greedy: score at most so many tokens of a text")]
Batch = Annotated[int | None, typer.Option(min=1, help="--greedy: windows at a time [default: 1, on a GPU 8]")]


@dataclass(frozen=True)
class Asked:
    """What --greedy and its options say."""

    texts: tuple[Path, ...]
    how: "How"


def asked(
    texts: Sequence[Path] | None,
    *,
    window: int | None,
    stride: int | None,
    limit_tokens: int | None,
    batch: int | None,
    device: str,
    compute_dtype: str,
    trust_remote_code: bool,
) -> Asked | None:
    """What is asked for; None without --greedy.

    raises: UsageError
    """
    if not texts:
        given = {"window": window, "stride": stride, "limit-tokens": limit_tokens, "batch": batch}
        if extra := next((name for name, value in given.items() if value is not None), None):
            raise UsageError(f"--{extra} tells how --greedy measures; give --greedy HELD.txt, or leave it out")
        return None
    from .held_out import How, check_stride

    check_stride(window, stride)
    dtype = None if compute_dtype == "auto" else compute_dtype
    return Asked(tuple(texts), How(window, stride, limit_tokens, batch, device, dtype, trust_remote_code))


def merge(recipe: "MergeRecipe", asked: Asked, job: Job) -> None:
    """Search, and merge what is found; or show what that would be.

    raises: WtoolError; typer.Exit after a plan is shown
    """
    from wtool import options

    from ..planner import plan_merge
    from .ledger import Ledger

    plan = planned(partial(plan_merge, recipe, **job.settings), job)
    if job.dry_run:
        code = show(plan, job)
        if not code and not job.as_json:
            _show_search(recipe, plan, asked)
        raise typer.Exit(code)
    check(plan, job)
    options.refuse_low_disk(job.low_disk, "--greedy")
    make = _search(recipe, plan, asked, job)
    run(make, replace(make(), warnings=plan.warnings), job)
    Ledger(job.output).remove()  # the output's manifest tells it now


def _show_search(recipe: "MergeRecipe", plan: "Plan", asked: Asked) -> None:
    """Tell what the search would do."""
    from wtool.console import emit, human_bytes
    from wtool.dtypes import config_name

    from .soup import evaluations

    recipe, held = _settled(recipe, plan, asked)
    emit(
        f"greedy: {len(recipe.models)} models to take or leave, at most {evaluations(recipe)} evaluations of "
        f"{held.scored:,} tokens each, one model of {human_bytes(held.model_bytes)} in {config_name(held.dtype)} "
        f"in memory ({held.device})"
    )


def _search(recipe: "MergeRecipe", plan: "Plan", asked: Asked, job: Job) -> "Callable[..., Plan]":
    """Choose the models and tell the table; returns what makes the plan of their merge.

    plan: of the recipe as it was asked
    """
    from wtool import console
    from wtool.executors.local import check_place

    from .ledger import Ledger
    from .soup import choose, evaluations, plan_of

    check_place(plan, job.output)
    recipe, held = _settled(recipe, plan, asked)
    ledger = Ledger(job.output, force=job.run["force"])
    total = evaluations(recipe) * held.scored
    with console.progress("measuring", total, quiet=job.quiet, unit="tokens") as advance:
        soup = choose(recipe, held, ledger, progress=advance, tell=log.debug, **job.settings)
    if not job.as_json:
        _print(soup, held)
    return partial(plan_of, soup.recipe, soup.record, **job.settings)


def _settled(recipe: "MergeRecipe", plan: "Plan", asked: Asked) -> "tuple[MergeRecipe, HeldOut]":
    from .held_out import held_out, read_texts
    from .soup import candidates

    contents = read_texts(asked.texts)
    plan.check()
    return candidates(recipe, plan), held_out(plan, contents, asked.how)


def _print(soup: "Soup", held: "HeldOut") -> None:
    from wtool import console

    from .held_out import perplexity
    from .soup import rows

    console.emit(f"perplexity on {', '.join(held.texts)}: {held.scored:,} tokens, windows of {held.window}")
    console.table(None, ["model", "alone", "without it", "with it", "so it is"], list(rows(soup)))
    best = min(trial.alone for trial in soup.trials if trial.taken)
    console.emit(
        f"the soup of {len(soup.recipe.models)} of {len(soup.models)} models has {perplexity(soup.loss):.4f}, "
        f"the best model alone {perplexity(best):.4f}"
    )
