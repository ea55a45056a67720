"""Error barrier: how far the loss rises on the straight line between two models.

Frankle, Dziugaite, Roy and Carbin, "Linear mode connectivity and the lottery ticket hypothesis", 2020,
https://arxiv.org/abs/1912.05671 (section 2: the largest loss on the line, less the mean of the ends').
Entezari, Sedghi, Saukh and Neyshabur, "The role of permutation invariance in linear mode connectivity of neural
networks", 2022, https://arxiv.org/abs/2110.06296 (equation 1: the line between the ends' losses in the mean's place).
Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs", 2018,
https://arxiv.org/abs/1802.10026: that minima which no straight line joins may be joined by a curve.

    barrier = max over t in [0, 1] of L((1 - t) A + t B) - ((1 - t) L(A) + t L(B))
    rise    = max over t in [0, 1] of L((1 - t) A + t B) - (L(A) + L(B)) / 2

Where the ends are equally good the two agree. Where they are not, the second takes the worse end for a rise; the
first is 0 at both ends, so it is what tells basins here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, isfinite

# Nats a token, of which h multiply the perplexity by e**h. Frankle et al. call two networks connected where the error
# rises by less than 2 %, and 0.02 nats are 2 % of perplexity. The others are conventions of ours: 10 % and 0.5 %.
CONNECTED = 0.02
APART = 0.1
WORTH = 0.005  # a gain that is worth a merge


@dataclass(frozen=True)
class Line:
    """The loss on the straight line from a model to another."""

    shares: tuple[float, ...]  # of the second model, rising from 0 to 1
    losses: tuple[float, ...]  # nats a token, one a share

    @cached_property
    def heights(self) -> tuple[float, ...]:
        """How far each point is above the line between the ends' losses; exactly 0 at the ends."""
        first, last = self.losses[0], self.losses[-1]
        inner = zip(self.shares[1:-1], self.losses[1:-1], strict=True)
        return (0.0, *((1 - share) * (loss - first) + share * (loss - last) for share, loss in inner), 0.0)

    @cached_property
    def top(self) -> int:
        """The point that is highest above the line; of equals the first, and one without a finite loss above all."""
        return max(range(len(self.heights)), key=lambda i: (not isfinite(self.heights[i]), self.heights[i], -i))

    @property
    def barrier(self) -> float:
        """Nats a token, 0 or more; NaN or infinite where a loss is."""
        return self.heights[self.top]

    @property
    def rise(self) -> float:
        """Over the mean of the ends' losses, nats a token."""
        highest = max(self.losses, key=lambda loss: (not isfinite(loss), loss))
        return highest - (self.losses[0] + self.losses[-1]) / 2

    @cached_property
    def lowest(self) -> int:
        """The point with the smallest loss; of equals the first."""
        return min(range(len(self.losses)), key=lambda i: (not isfinite(self.losses[i]), self.losses[i], i))

    @property
    def gain(self) -> float:
        """How far the lowest point is below the better end, nats a token, 0 or more."""
        return min(self.losses[0], self.losses[-1]) - self.losses[self.lowest]


def shares(points: int) -> tuple[float, ...]:
    """Points evenly from 0 to 1, both among them; points: 3 or more."""
    return tuple(number / (points - 1) for number in range(points))


def reading(line: Line, first: str, second: str) -> list[str]:
    """What a line tells, in words."""
    return [_basin(line), _lowest(line, first, second), _advice(line, first, second)]


def kind(line: Line) -> str:
    """connected, ridge, apart; or unknown where the loss at an end is not finite."""
    if not (isfinite(line.losses[0]) and isfinite(line.losses[-1])):
        return "unknown"
    if line.barrier <= CONNECTED:
        return "connected"
    return "ridge" if line.barrier <= APART else "apart"


def _basin(line: Line) -> str:
    found, height = kind(line), _height(line)
    if found == "unknown":
        return "The loss at an end is not finite: there is no line to measure from."
    if found == "connected":
        return f"One basin: the barrier is {height}, not above {CONNECTED} (2 % of perplexity)."
    if found == "ridge":
        return f"A low ridge: the barrier is {height}, between {CONNECTED} and {APART} (2 % and 10 % of perplexity)."
    return f"Different basins: the barrier is {height}, above {APART} (10 % of perplexity)."


def _height(line: Line) -> str:
    if not isfinite(line.barrier):
        return f"not finite at t = {line.shares[line.top]:.3g}"
    where = f" at t = {line.shares[line.top]:.3g}" if line.barrier > 0 else ""
    return f"{line.barrier:.4f} nats{where}"


def _lowest(line: Line, first: str, second: str) -> str:
    share, loss = line.shares[line.lowest], line.losses[line.lowest]
    if not isfinite(loss):
        return "No point of the line has a finite loss."
    figure = f"perplexity {exp(loss):.4f}"
    if line.lowest in (0, len(line.shares) - 1):
        return f"The lowest point is an end, {first if line.lowest == 0 else second}: {figure}."
    return f"The lowest point is at t = {share:.3g}: {figure}, {1 - exp(-line.gain):.2%} below the better end."


def _advice(line: Line, first: str, second: str) -> str:
    share = line.shares[line.lowest]
    if kind(line) == "unknown":
        return "Look at the weights first (wtool diff)."
    if line.gain >= WORTH:
        merge = f"wtool merge {first} {second} -w {1 - share:.3g} -w {share:.3g}"
        return f"Merging pays on this text: {merge}"
    if kind(line) == "connected":
        best = first if line.losses[0] <= line.losses[-1] else second
        return (
            f"No mean of the two does better on this text than {best} alone; "
            "judge them on one that has something of what each was trained on."
        )
    return (
        "A mean of the two does not pay: the models were not trained from one base, or went far from it. "
        "Methods that keep to one model's basin (task arithmetic with small weights) or that align first are left."
    )


def matrix(count: int, barriers: Sequence[tuple[int, int, float]]) -> list[list[float | None]]:
    """The barriers of pairs as a table [count, count], symmetric, None on the diagonal."""
    table: list[list[float | None]] = [[None] * count for _ in range(count)]
    for first, second, height in barriers:
        table[first][second] = table[second][first] = height
    return table
