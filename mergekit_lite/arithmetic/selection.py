"""Finding the k elements of the largest magnitude, without sorting and without holding the magnitudes.

A magnitude is whatever a method ranks elements by (the size of a task vector, the variance over models), computed
piece by piece. The threshold is the k-th largest. A sample of the elements tells a narrow bracket around it; one walk
counts the elements above the bracket and gathers the few inside, among which the threshold is found exactly. Where
the sample misled, a wider bracket is tried. Where that fails too (or too many elements are inside, as with many equal
values), two walks with histograms over the halves of the float's bits find it exactly in constant memory.

Ties at the threshold are broken by position: earlier elements are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, nextafter, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import chunks

SAMPLE = 1 << 17  # elements
SAMPLE_RUN = 32  # consecutive ones, as memory is read by the line
MARGINS = (4.0, 40.0)  # half the bracket's width, in standard errors of the sample
MAX_INSIDE = 0.2  # share of the elements that may lie inside the bracket


@dataclass(frozen=True)
class Cut:
    """Which elements are kept: those above `magnitude`, and those equal to it before element `ties_end`."""

    magnitude: float
    ties_end: int

    def mask(self, begin: int, magnitude: Tensor) -> Tensor:
        """Turn a piece of the magnitudes, in place, into 1 where the element is kept and 0 where it is not."""
        ties = self._ties(begin, magnitude)
        magnitude[:ties].ge_(self.magnitude)
        magnitude[ties:].gt_(self.magnitude)
        return magnitude

    def shrink(self, begin: int, part: Tensor) -> None:
        """Set to 0, in place, what is not kept of a piece of the vector whose absolute values are the magnitudes."""
        # hardshrink keeps |d| > threshold: just below the magnitude, it keeps the ties too
        ties = self._ties(begin, part)
        for piece, threshold in ((part[:ties], self._below(part.dtype)), (part[ties:], self.magnitude)):
            if piece.numel():
                torch.hardshrink(piece, threshold, out=piece)

    def _ties(self, begin: int, part: Tensor) -> int:
        return min(max(self.ties_end - begin, 0), part.numel())

    def _below(self, dtype: torch.dtype) -> float:
        if dtype == torch.float64:
            return nextafter(self.magnitude, -inf)
        return float(np.nextafter(np.float32(self.magnitude), np.float32(-inf)))


Magnitude = Callable[[list[Tensor]], Tensor]
"""The tensors' pieces in the working type, which it may overwrite -> what their elements are ranked by, 0 or more."""


@dataclass(frozen=True)
class Magnitudes:
    """What the elements of tensors of one shape are ranked by."""

    of: Magnitude
    tensors: Sequence[Tensor]

    @property
    def count(self) -> int:
        return self.tensors[0].numel()

    def pieces(self) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """Yield (first element, magnitudes); the memory is used again."""
        for begin, parts in chunks.pieces(self.tensors):
            yield begin, self.of(parts).numpy()

    def piece(self, begin: int) -> NDArray[np.floating]:
        """The magnitudes of the piece that begins with an element."""
        rows = slice(begin, min(begin + chunks.CHUNK, self.count))
        ((_, magnitude),) = Magnitudes(self.of, [tensor.reshape(-1)[rows] for tensor in self.tensors]).pieces()
        return magnitude

    def sample(self) -> NDArray[np.floating]:
        """Of runs of elements spread evenly over the tensors; of all where they are few."""
        kind = chunks.working_type(self.tensors)
        flat = [tensor.reshape(-1) for tensor in self.tensors]
        runs = SAMPLE // SAMPLE_RUN
        if self.count >= 4 * SAMPLE:
            stride = self.count // runs - 1 | 1  # odd, so that the runs do not stand below each other in a matrix
            flat = [part[: runs * stride].view(runs, stride)[:, :SAMPLE_RUN] for part in flat]
        return self.of([part.to(kind, copy=True).reshape(-1) for part in flat]).numpy()


def largest(base: Tensor, model: Tensor, *, keep: int) -> Cut:
    """Find the `keep` elements of largest |model - base|, computed in the working type.

    keep: between 0 and the number of elements
    """
    return top(distances(base, model), keep=keep)


def top(magnitudes: Magnitudes, *, keep: int) -> Cut:
    """Find the `keep` elements of largest magnitude.

    keep: between 0 and the number of elements
    """
    if keep >= magnitudes.count:
        return Cut(magnitude=-1.0, ties_end=magnitudes.count)
    if keep == 0:
        return Cut(magnitude=inf, ties_end=0)
    sample = magnitudes.sample()
    for margin in MARGINS:
        if cut := _by_bracket(magnitudes, keep, *_bracket(sample, 1.0 - keep / magnitudes.count, margin)):
            return cut
    return _by_histogram(magnitudes, keep)


def distances(base: Tensor, model: Tensor) -> Magnitudes:
    """|model - base|, computed in the working type."""
    return Magnitudes(lambda parts: parts[1].sub_(parts[0]).abs_(), (base, model))


def _by_bracket(magnitudes: Magnitudes, keep: int, low: float, high: float) -> Cut | None:
    """Find the threshold if it lies between two magnitudes that few elements lie between; else None."""
    above, gathered, inside = 0, 0, []
    most_inside = max(MAX_INSIDE * magnitudes.count, chunks.CHUNK)
    is_above, is_inside = np.empty(chunks.CHUNK, dtype=bool), np.empty(chunks.CHUNK, dtype=bool)
    for _, magnitude in magnitudes.pieces():
        over = np.greater(magnitude, high, out=is_above[: magnitude.size])
        within = np.greater_equal(magnitude, low, out=is_inside[: magnitude.size])
        above += int(np.count_nonzero(over))
        inside.append(magnitude[np.not_equal(within, over, out=within)])
        gathered += inside[-1].size
        if above >= keep or gathered > most_inside:
            return None
    rank = keep - above  # of the threshold among the gathered, from the largest, from 1
    if rank > gathered:
        return None
    pool = np.concatenate(inside)
    threshold = float(np.partition(pool, gathered - rank)[gathered - rank])
    wanted = rank - int(np.count_nonzero(pool > threshold))  # ties to keep
    return Cut(threshold, _ties_end(magnitudes, threshold, wanted, [int((p == threshold).sum()) for p in inside]))


def _bracket(sample: NDArray[np.floating], share: float, margin: float) -> tuple[float, float]:
    """Magnitudes likely just below and just above the one that a share of all elements lies below.

    margin: in standard errors
    """
    width = margin * sqrt(share * (1.0 - share) / sample.size) + 2.0 / sample.size
    low, high = floor((share - width) * sample.size), ceil((share + width) * sample.size)
    ends = [end for end in (low, high) if 0 <= end < sample.size]
    ordered = np.partition(sample, ends) if ends else sample
    return (
        float(ordered[low]) if low >= 0 else 0.0,
        float(ordered[high]) if high < sample.size else inf,
    )


def _by_histogram(magnitudes: Magnitudes, keep: int) -> Cut:
    """Find the threshold digit by digit in the bits of the magnitudes, which sort as their values do."""
    prefix, left, shift = 0, keep, 0
    bits = torch.finfo(chunks.working_type(magnitudes.tensors)).bits
    integer = np.uint32 if bits == 32 else np.uint64
    for shift in range(bits - 16, -1, -16):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for _, magnitude in magnitudes.pieces():
            digits: NDArray[np.unsignedinteger] = magnitude.view(integer) >> integer(shift)
            digits = digits[(digits >> integer(16)) == integer(prefix)] & integer(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        from_top = np.cumsum(counts[::-1])  # elements with this digit or a larger one
        steps = int(np.searchsorted(from_top, left))
        left -= int(from_top[steps - 1]) if steps else 0
        prefix = prefix << 16 | (0xFFFF - steps)
    threshold = float(np.array([prefix], dtype=integer).view(np.float32 if bits == 32 else np.float64)[0])
    ties = [int(np.count_nonzero(magnitude == threshold)) for _, magnitude in magnitudes.pieces()]
    return Cut(threshold, _ties_end(magnitudes, threshold, left, ties))


def _ties_end(magnitudes: Magnitudes, threshold: float, wanted: int, ties: list[int]) -> int:
    """The element before which exactly `wanted` magnitudes equal the threshold.

    ties: how many there are in each piece
    """
    if wanted == sum(ties):
        return magnitudes.count
    number = int(np.searchsorted(np.cumsum(ties), wanted))
    begin = number * chunks.CHUNK
    within = wanted - sum(ties[:number])
    return begin + int(np.flatnonzero(magnitudes.piece(begin) == threshold)[within - 1]) + 1
