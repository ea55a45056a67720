"""Finding the sizes for a budget (parameters, bytes, weights of a token), by what each costs in loss.

The loss is measured for a few sizes of each kind alone: with one layer less after the other, with fewer channels in the
feed-forward blocks, with fewer key-value heads. The rise of several cuts at once is taken to be the sum of their rises;
of all combinations within the budget the few with the lowest sum are measured themselves, and the best is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from wtool.errors import UsageError

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
FINALISTS = 4
DEEPEST = 0.5  # share of the layers that may go


@dataclass(frozen=True)
class Sizes:
    """Sizes to keep."""

    layers: int
    inner: int  # ffn channels, or experts where layers have these
    kv_heads: int


@dataclass(frozen=True)
class Costs:
    """The rise of the loss by each cut alone, in nats per token."""

    layers: Mapping[int, float]
    inner: Mapping[int, float]
    kv_heads: Mapping[int, float]

    def of(self, sizes: Sizes) -> float:
        return self.layers[sizes.layers] + self.inner[sizes.inner] + self.kv_heads[sizes.kv_heads]


def widths(size: int, least: int = 1) -> list[int]:
    """Numbers of channels (or experts) to try: shares of what there is, in multiples that runtimes like."""
    step = next(step for step in (256, 128, 64, 32, 16, 8, 4, 2, 1) if step <= max(1, size // 12))
    shares = {max(step, least, round(share * size / step) * step) if share < 1 else size for share in SHARES}
    return sorted(shares, reverse=True)


def best(
    costs: Costs,
    parameters: Callable[[Sizes], int],
    budget: int,
    measured: Callable[[Sizes], float],
    *,
    unit: str = "parameters",
) -> Sizes:
    """The sizes with the lowest loss within a budget.

    parameters: of a model with these sizes, or whatever the budget is of
    unit: its name
    measured: the loss of such a model
    raises: UsageError where even the smallest sizes are too large
    """
    everything = list(_all(costs))
    fitting = [sizes for sizes in everything if parameters(sizes) <= budget]
    if not fitting:
        least = min(parameters(sizes) for sizes in everything)
        raise UsageError(
            f"{budget:,} {unit}: the smallest of the sizes that are tried has {least:,}; "
            "for less give sizes yourself, with fewer hidden channels among them"
        )
    finalists = sorted(fitting, key=lambda sizes: (costs.of(sizes), -parameters(sizes)))[:FINALISTS]
    return finalists[0] if len(finalists) == 1 else min(finalists, key=measured)


def _all(costs: Costs) -> Iterator[Sizes]:
    return (Sizes(*each) for each in product(costs.layers, costs.inner, costs.kv_heads))


def parameter_count(count: Callable[[Sizes], int], whole: Sizes, least: Sizes) -> Callable[[Sizes], int]:
    """What is counted as a function of sizes, from a few counts: outside + layers · (a + b · inner + c · heads).

    count: of a model with these sizes, exact and slow
    least: the smallest sizes that can be counted
    """
    one = replace(whole, layers=1)
    per_layer = (count(whole) - count(one)) // (whole.layers - 1) if whole.layers > 1 else 0
    outside = count(whole) - whole.layers * per_layer
    narrow = _slope(count, one, replace(one, inner=least.inner), whole.inner - least.inner)
    few = _slope(count, one, replace(one, kv_heads=least.kv_heads), whole.kv_heads - least.kv_heads)

    def counted(sizes: Sizes) -> int:
        less = narrow * (whole.inner - sizes.inner) + few * (whole.kv_heads - sizes.kv_heads)
        return outside + sizes.layers * (per_layer - less)

    return counted


def _slope(count: Callable[[Sizes], int], more: Sizes, less: Sizes, difference: int) -> int:
    return (count(more) - count(less)) // difference if difference else 0


def depths(layers: int) -> Sequence[int]:
    """Depths to try, from the whole down."""
    return range(layers, max(1, round(layers * DEEPEST)) - 1, -1)
