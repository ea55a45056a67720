"""From a recipe to the greedy soup of its models: which are taken, the plan that writes them, and the record of it.

Each merge that is tried is the plan of the recipe with fewer models, measured without being written; the output is
then an ordinary merge of those that were taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

from wtool.errors import RuntimeProblem, UsageError
from wtool.plan import Plan

from ..planner import plan_merge
from ..recipe import MergeRecipe
from .greedy import Members, Trial, greedy
from .held_out import HeldOut, Progress, mean_loss, measure, perplexity
from .ledger import Ledger, finite

Start = Callable[[int], Progress]


@dataclass(frozen=True)
class Soup:
    """What was found."""

    recipe: MergeRecipe  # of the models that were taken
    models: tuple[str, ...]  # all that were tried, as the recipe names them
    trials: tuple[Trial, ...]  # in the order in which they were tried
    loss: float  # of the soup, in nats a token
    record: Mapping[str, Any]  # for the manifest (JSON)


def candidates(recipe: MergeRecipe, plan: Plan) -> MergeRecipe:
    """The recipe whose models can be taken or left: its base settled and not among them.

    plan: of the recipe as it was asked

    raises: UsageError where the method or the recipe is not for it
    """
    row, name = recipe.method, recipe.merge_method
    if not recipe.models:
        raise UsageError("--greedy takes or leaves whole models; this recipe has slices or modules")
    if row.least > 1 or row.most is not None:
        raise UsageError(f"--greedy needs a method that takes one model or more (linear, ties, …); {name} does not")
    base = plan.recipe["merge"].get("base_model")
    takes_base = row.has_base or (row.may_have_base and base is not None)
    models = tuple(entry for entry in recipe.models if not (takes_base and entry.model == base))
    return recipe.model_copy(update={"models": models, "base_model": base})


def evaluations(recipe: MergeRecipe) -> int:
    """How many merges are measured at most."""
    return 2 * len(recipe.models) - 1


def plan_of(recipe: MergeRecipe, record: Mapping[str, Any], **settings: Any) -> Plan:
    """The plan of a soup, whose manifest tells how it was found."""
    plan = plan_merge(recipe, **settings)
    return replace(plan, about={**plan.about, "greedy": dict(record)})


def choose(
    recipe: MergeRecipe,
    held: HeldOut,
    ledger: Ledger,
    *,
    progress: Progress = lambda tokens: None,
    tell: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Soup:
    """Find which models to take.

    recipe:   of `candidates`
    progress: is told the tokens that need not be scored any more
    tell:     is told each measurement, in words
    settings: of `plan_merge`

    raises: RuntimeProblem where no model's loss is finite, and whatever planning and measuring raise
    """
    measured: dict[str, list[float]] = {}
    names = tuple(entry.model for entry in recipe.models)

    def loss(members: Members) -> float:
        plan = plan_merge(_of(recipe, members), **settings)
        key = held.key(plan)
        measured[key] = _measured(plan, " + ".join(names[i] for i in members), key, held, ledger, progress)
        value = mean_loss(measured[key])
        tell(f"{' + '.join(names[i] for i in members)}: perplexity {perplexity(value):.4f}")
        return value

    trials = tuple(greedy(len(names), loss))
    taken = tuple(sorted(trial.model for trial in trials if trial.taken))
    if not taken:
        raise RuntimeProblem(f"no model gives the held-out text a finite perplexity, the first is {names[0]}")
    best = next(trial.together for trial in reversed(trials) if trial.taken)
    return Soup(_of(recipe, taken), names, trials, best, _record(names, trials, best, held, measured))


def _of(recipe: MergeRecipe, members: Sequence[int]) -> MergeRecipe:
    return recipe.model_copy(update={"models": tuple(recipe.models[i] for i in members)})


def _measured(plan: Plan, label: str, key: str, held: HeldOut, ledger: Ledger, progress: Progress) -> list[float]:
    """The loss of each text, measured now or before."""
    known = ledger.find(key)
    if known is not None:
        progress(held.scored)
        return known
    ledger.require_room()
    found = [each.nats_per_token for each in measure(plan, label, held, progress)]
    ledger.keep(key, found)
    return found


def _record(
    names: Sequence[str],
    trials: Sequence[Trial],
    best: float,
    held: HeldOut,
    measured: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """How the soup was found, as the manifest tells it."""
    return {
        **held.record(),
        "tokens": held.scored,
        "nats_per_token": best,
        "tried": [
            {
                "model": names[trial.model],
                "taken": trial.taken,
                **dict(zip(("alone", "before", "together"), finite(_losses(trial)), strict=True)),
            }
            for trial in trials
        ],
        "measured": {key: finite(nats) for key, nats in measured.items()},
    }


def _losses(trial: Trial) -> list[float]:
    return [trial.alone, trial.before, trial.together]


def rows(soup: Soup) -> Iterator[list[str]]:
    """The table of what became of each model: name, perplexity alone, without it, with it, what was done."""
    for trial in soup.trials:
        alone, before, together = (perplexity(nats) for nats in _losses(trial))
        first = trial.before == inf
        yield [
            soup.models[trial.model],
            f"{alone:.4f}",
            "" if first else f"{before:.4f}",
            f"{together:.4f}",
            _why(trial, first),
        ]


def _why(trial: Trial, first: bool) -> str:
    if not isfinite(trial.together):
        return "left: not finite"
    if first:
        return "taken: the best alone"
    return "taken: does not rise" if trial.taken else "left: rises"
