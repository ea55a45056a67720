"""What of a report's figures is drawn: the title, the words, and where the figure is found."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from wtool.report.figures import Linear, middle


@dataclass(frozen=True)
class Measure:
    """A figure that each linear has."""

    name: str
    title: str
    explained: str
    of: Callable[[Linear], float | None]
    logarithmic: bool = True
    low_is_bad: bool = False

    def badness(self, each: Linear) -> float:
        """The figure, to sort by: what is not finite is beyond all others, what is not known below."""
        value = self.of(each)
        if value is None:
            return -inf
        return (-value if self.low_is_bad else value) if isfinite(value) else inf

    def worst(self, found: Iterable[Linear]) -> Linear:
        """The linear that is off most."""
        return max(found, key=self.badness)


OUTPUT = Measure(
    "output error",
    "Output error, block by block",
    "How far a layer's output on the calibration tokens moved, relative to its size.",
    lambda each: each.error,
)
WEIGHT = Measure(
    "weight error",
    "Weight error, block by block",
    "How far a layer's weights moved, relative to their size.",
    lambda each: each.weight_error,
)
SPARSITY = Measure(
    "sparsity",
    "Zeros, block by block",
    "The share of a layer's weights that are 0.",
    lambda each: each.sparsity,
    logarithmic=False,
)
CONFLICT = Measure(
    "conflict",
    "Where the models disagree",
    "The share of weights that one model moved up from the base and another down (on a sample of the weights).",
    lambda each: each.conflict,
    logarithmic=False,
)
COSINE = Measure(
    "cosine",
    "How alike the models' changes are",
    "The cosine between what the models changed: 100 % is the same direction, below 0 they pull apart.",
    lambda each: each.cosine,
    logarithmic=False,
    low_is_bad=True,
)
MOVED = Measure(
    "moved",
    "How far the models moved",
    "How far the models' weights are from the base, relative to its size (root of the mean square over the models).",
    lambda each: each.moved,
)
UNTOUCHED = Measure(
    "untouched",
    "What the merge left alone",
    "Of the weights that some model moved, the share that is as in the base: trimmed, outvoted or rounded away.",
    lambda each: each.untouched,
    logarithmic=False,
)
CHANGE = Measure(
    "change",
    "How far from the base",
    "How far the merged weights are from the base, relative to its size (on a sample of the weights).",
    lambda each: each.change,
)


def shown(found: Sequence[Linear]) -> list[Measure]:
    """The measures that these linears have, the ones that say nothing left out."""
    has_outputs = middle([each.output_error for each in found]) is not None
    first = OUTPUT if has_outputs else WEIGHT
    asked = [first, *((SPARSITY,) if _differs(SPARSITY, found) else ()), CONFLICT, COSINE, MOVED, CHANGE, UNTOUCHED]
    return [measure for measure in asked if any(measure.of(each) is not None for each in found)]


def _differs(measure: Measure, found: Sequence[Linear]) -> bool:
    """Whether a share is not the same everywhere, within a hundredth."""
    known = [value for each in found if (value := measure.of(each)) is not None]
    return bool(known) and max(known) - min(known) > 0.01
