"""From a figure to a colour: the scales of heatmaps, logarithmic for errors and linear for shares."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, isfinite, log, sqrt

STEPS = 9  # colours
SPAN = 4  # from the smallest to the largest error of a logarithmic scale, at least
WIDTH = 0.1  # of a linear scale, at least

# the units numbers are shown in: (the largest figure is at least this, the name, how many of it make 1)
UNITS = ((0.3, "%", 1e2), (5e-4, "‰", 1e3), (0.0, "millionths", 1e6))


@dataclass(frozen=True)
class Scale:
    """Where the colours begin and end; low < high, and 0 < low where it is logarithmic."""

    low: float
    high: float
    logarithmic: bool

    def step(self, value: float) -> int:
        """The colour of a figure, 0 to STEPS - 1; beyond an end that end's."""
        if value <= self.low:
            return 0
        share = log(value / self.low) / log(self.high / self.low) if self.logarithmic else self._linear(value)
        return min(STEPS - 1, int(STEPS * share))

    def edges(self) -> list[float]:
        """Where the colours meet: STEPS + 1 figures from low to high."""
        shares = [number / STEPS for number in range(STEPS + 1)]
        if self.logarithmic:
            return [self.low * exp(log(self.high / self.low) * share) for share in shares]
        return [self.low + (self.high - self.low) * share for share in shares]

    @property
    def unit(self) -> tuple[str, float]:
        """The name of the unit, and how many of it make 1."""
        largest = max(abs(self.low), abs(self.high))
        return next((name, many) for least, name, many in UNITS if largest >= least)

    def _linear(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def scale_of(values: Iterable[float | None], *, logarithmic: bool) -> Scale | None:
    """The scale that holds all finite figures; None where there is nothing to show.

    Never narrow: layers that are alike are to look alike. A figure of 0 is below every logarithmic scale.
    """
    known = [value for value in values if value is not None and isfinite(value) and (value > 0 or not logarithmic)]
    if not known:
        return None
    low, high = min(known), max(known)
    if logarithmic:
        wider = max(1.0, sqrt(SPAN * low / high))
        return Scale(low / wider, high * wider, True)
    more = max(0.0, WIDTH - (high - low)) / 2
    return Scale(low - more, high + more, False)
