"""`wtool merge --greedy`: its options, and what it prints."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool.errors import UsageError

if TYPE_CHECKING:
    from wtool.plan import Plan

    from .greedy_soup import Soup
    from .held_out import HeldOut, How
    from .recipe import MergeRecipe

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


def show(recipe: "MergeRecipe", plan: "Plan", asked: Asked) -> None:
    """Tell what the search would do."""
    from wtool.console import emit, human_bytes
    from wtool.dtypes import config_name

    from .greedy_soup import evaluations

    recipe, held = _settled(recipe, plan, asked)
    emit(
        f"greedy: {len(recipe.models)} models to take or leave, at most {evaluations(recipe)} evaluations of "
        f"{held.scored:,} tokens each, one model of {human_bytes(held.model_bytes)} in {config_name(held.dtype)} "
        f"in memory ({held.device})"
    )


def search(
    recipe: "MergeRecipe",
    plan: "Plan",
    output: Path,
    asked: Asked,
    *,
    force: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> "Callable[..., Plan]":
    """Choose the models and tell the table; returns what makes the plan of their merge.

    plan:     of the recipe as it was asked
    settings: of `plan_merge`

    raises: WtoolError
    """
    from wtool import console
    from wtool.executors.local import check_place

    from .greedy_ledger import Ledger
    from .greedy_soup import choose, evaluations, plan_of

    check_place(plan, output)
    recipe, held = _settled(recipe, plan, asked)
    ledger = Ledger(output, force=force)
    total = evaluations(recipe) * held.scored
    with console.progress("measuring", total, quiet=quiet, unit="tokens") as advance:
        soup = choose(recipe, held, ledger, progress=advance, tell=log.debug, **settings)
    if not as_json:
        _print(soup, held)
    return partial(plan_of, soup.recipe, soup.record, **settings)


def done(output: Path) -> None:
    """Forget what the output's manifest tells now."""
    from .greedy_ledger import Ledger

    Ledger(output).remove()


def _settled(recipe: "MergeRecipe", plan: "Plan", asked: Asked) -> "tuple[MergeRecipe, HeldOut]":
    from .greedy_soup import candidates
    from .held_out import held_out, read_texts

    contents = read_texts(asked.texts)
    plan.check()
    return candidates(recipe, plan), held_out(plan, contents, asked.how)


def _print(soup: "Soup", held: "HeldOut") -> None:
    from wtool import console

    from .greedy_soup import rows
    from .held_out import perplexity

    console.emit(f"perplexity on {', '.join(held.texts)}: {held.scored:,} tokens, windows of {held.window}")
    console.table(None, ["model", "alone", "without it", "with it", "so it is"], list(rows(soup)))
    best = min(trial.alone for trial in soup.trials if trial.taken)
    console.emit(
        f"the soup of {len(soup.recipe.models)} of {len(soup.models)} models has {perplexity(soup.loss):.4f}, "
        f"the best model alone {perplexity(best):.4f}"
    )
