"""The losses on the straight lines between models: each point is what `wtool merge -w 1-t -w t` would write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from wtool.evaluate import Evaluation
from wtool.plan import Plan

from ..planner import plan_merge
from ..recipe import MergeRecipe, parse_recipe
from .barrier import Line, shares
from .held_out import HeldOut, Progress, mean_loss, measure

Weights = tuple[tuple[int, float], ...]  # (number of a model, its share), without shares of 0


@dataclass(frozen=True)
class Walked:
    """A line between two of the models."""

    first: int
    second: int
    points: tuple[tuple[Evaluation, ...], ...]  # of each share the evaluation of each text
    line: Line  # of the mean over the texts

    def of_text(self, number: int) -> Line:
        """The line on one text alone."""
        return replace(self.line, losses=tuple(texts[number].nats_per_token for texts in self.points))


def plan_all(models: Sequence[str], **settings: Any) -> Plan:
    """A plan that reads all models, to find what stands against it.

    settings: of `plan_merge`
    """
    return plan_merge(_recipe(models, [1.0] * len(models)), **settings)


def evaluations(models: int, points: int) -> int:
    """How many models are measured; each end once."""
    return models + models * (models - 1) // 2 * (points - 2)


def walk(
    models: Sequence[str],
    held: HeldOut,
    *,
    points: int,
    progress: Progress = lambda tokens: None,
    tell: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> list[Walked]:
    """Measure the lines between all pairs of models.

    points: on each line, both ends among them, 3 at least
    progress: is told the tokens scored
    tell: is told each point, in words
    settings: of `plan_merge`
    """
    ends: dict[int, tuple[Evaluation, ...]] = {}

    def at(first: int, second: int, share: float) -> tuple[Evaluation, ...]:
        end = first if share == 0 else second if share == 1 else None
        if end in ends:
            return ends[end]
        plan = plan_merge(_recipe([models[first], models[second]], [1 - share, share]), **settings)
        label = f"{1 - share:.3g} {models[first]} + {share:.3g} {models[second]}"
        found = tuple(measure(plan, label, held, progress))
        tell(f"{label}: {mean_loss([each.nats_per_token for each in found]):.6f} nats a token")
        if end is not None:
            ends[end] = found
        return found

    return [
        _walked(first, second, [at(first, second, share) for share in shares(points)])
        for first, second in combinations(range(len(models)), 2)
    ]


def alone(
    model: str, held: HeldOut, *, progress: Progress = lambda tokens: None, **settings: Any
) -> tuple[Evaluation, ...]:
    """What one model makes of each text."""
    return tuple(measure(plan_merge(_recipe([model], [1.0]), **settings), model, held, progress))


def _walked(first: int, second: int, found: Sequence[tuple[Evaluation, ...]]) -> Walked:
    losses = tuple(mean_loss([each.nats_per_token for each in texts]) for texts in found)
    return Walked(first, second, tuple(found), Line(shares(len(found)), losses))


def _recipe(models: Sequence[str], weights: Sequence[float]) -> MergeRecipe:
    entries = [
        {"model": model, "parameters": {"weight": weight}} for model, weight in zip(models, weights, strict=True)
    ]
    return parse_recipe({"merge_method": "linear", "models": entries}, "command line")
