"""Greedy soup: models by their held-out loss, each taken only if the loss of the merge does not rise.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", 2022, https://arxiv.org/abs/2203.05482 (recipe 1).

    taken = {the best}; for the next best i: if loss(merge(taken + {i})) <= loss(merge(taken)): taken += {i}

The paper's merge is the uniform mean. Any other that takes one model or more can stand in its place; a model alone
is then the merge of it alone. The result is never worse on the held-out text than the best model alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isfinite

Members = tuple[int, ...]  # numbers of models, in rising order
Loss = Callable[[Members], float]


@dataclass(frozen=True)
class Trial:
    """What became of one model."""

    model: int
    alone: float  # loss of the merge of it alone
    before: float  # loss of the merge without it; infinite for the first
    together: float  # loss of the merge with it; NaN where it was not tried
    taken: bool


def greedy(count: int, loss: Loss) -> Iterator[Trial]:
    """Try models one after the other, the best first; of equals the one that was named first.

    count: models, at least 1
    loss:  of the merge of some models, in nats a token; one that is not finite is worse than any
    yields: each model once, as soon as it is decided on
    """
    alone = [loss((model,)) for model in range(count)]
    order = sorted(range(count), key=lambda model: (_worth(alone[model]), model))
    taken: Members = ()
    best = inf
    for model in order:
        if not isfinite(alone[model]):
            yield Trial(model, alone[model], best, float("nan"), False)
            continue
        members = tuple(sorted((*taken, model)))
        together = loss(members) if taken else alone[model]
        better = together <= best
        yield Trial(model, alone[model], best, together, better)
        if better:
            taken, best = members, together


def _worth(loss: float) -> float:
    return loss if isfinite(loss) else inf
