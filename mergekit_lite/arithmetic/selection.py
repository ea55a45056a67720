"""Finding the k elements of the largest magnitude, without sorting and without holding the magnitudes.

A magnitude is what a method ranks elements by (the size of a task vector, the variance over models), computed block
by block. The threshold is the k-th largest. A sample of the elements tells a narrow bracket around it; one walk
counts the elements above the bracket and gathers the few inside, among which the threshold is found exactly. Where
the sample misled, a wider bracket is tried. Where that fails too, two walks with histograms over the halves of the
float's bits find it exactly in constant memory. Fine-tunings stored in 16 bits differ from their base by few different
amounts: where many of the sample are equal to the one at the threshold's place in it, one walk tells if it is that.

Ties at the threshold are broken by position: earlier elements are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, inf, isnan, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import chunks

SAMPLE = 1 << 17  # elements
SAMPLE_RUN = 64  # consecutive ones, as memory is read by the line
MARGINS = (4.0, 40.0)  # half the bracket's width, in standard errors of the sample
MAX_INSIDE = 0.2  # share of the elements that may lie inside the bracket
MANY = 0.1  # share of equal ones in the sample from which they are counted and not gathered


@dataclass(frozen=True)
class Cut:
    """Which elements are kept: those above `magnitude`, and those equal to it before element `ties_end`."""

    magnitude: float
    ties_end: int


@dataclass(frozen=True)
class Magnitudes:
    """How far tensors of one shape lie apart: of two |b - a|, of more their variance times their number.

    rows: what the magnitudes of each row (along the last axis) are multiplied by, 0 or more, in the working type
    """

    tensors: Sequence[Tensor]
    rows: NDArray[np.floating] | None = None

    @property
    def count(self) -> int:
        return self.tensors[0].numel()

    @property
    def columns(self) -> int:
        """Of a row."""
        return self.tensors[0].shape[-1] if self.tensors[0].dim() else 1

    def pieces(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """Yield (first element, magnitudes), of elements from one to another; the memory is used again."""
        flat = [tensor.reshape(-1)[begin:end] for tensor in self.tensors]
        for first, piece in _plain(flat):
            if self.rows is not None:
                chunks.kernels().scale_rows(piece, begin + first, self.columns, self.rows)
            yield begin + first, piece

    def sample(self) -> NDArray[np.floating]:
        """Of runs of elements spread evenly over the tensors, of all where they are few; in ascending order."""
        flat = [tensor.reshape(-1) for tensor in self.tensors]
        places = np.arange(min(self.count, 4 * SAMPLE))
        if self.count >= 4 * SAMPLE:
            runs = SAMPLE // SAMPLE_RUN
            stride = self.count // runs - 1 | 1  # odd, so that the runs do not stand below each other in a matrix
            flat = [part[: runs * stride].view(runs, stride)[:, :SAMPLE_RUN].contiguous() for part in flat]
            places = (stride * np.arange(runs)[:, None] + np.arange(SAMPLE_RUN)).reshape(-1)
        found = np.concatenate([piece.copy() for _, piece in _plain(flat)])
        if self.rows is not None:
            found *= self.rows[places // self.columns]
        found.sort()  # has vector instructions, which a partition by two places lacks
        return found


def _plain(tensors: Sequence[Tensor]) -> Iterator[tuple[int, NDArray[np.floating]]]:
    """Pieces of the magnitudes, without the rows' factors."""
    found = chunks.empty(tensors, min(chunks.CHUNK, tensors[0].numel()))
    work = chunks.work(tensors, len(tensors) + 2)
    for begin, parts in chunks.pieces(tensors):
        piece = found[: parts[0].size]
        chunks.kernels().spread(parts, piece, work)
        yield begin, piece


def top(magnitudes: Magnitudes, *, keep: int) -> Cut:
    """Find the `keep` elements of largest magnitude.

    keep: between 0 and the number of elements
    """
    return tops(magnitudes, keep=[keep])[0]


def tops(magnitudes: Magnitudes, *, keep: Sequence[int]) -> list[Cut]:
    """The same for several numbers of elements, in one walk."""
    count = magnitudes.count
    found = {0: Cut(magnitude=inf, ties_end=0), count: Cut(magnitude=-1.0, ties_end=count)}
    if any(number not in found for number in keep):
        sample = magnitudes.sample()
        for find in (_by_equals, *(_Brackets(margin) for margin in MARGINS), _by_histograms):
            if wanted := sorted({number for number in keep if number not in found}):
                found |= find(magnitudes, sample, wanted)
    return [found[number] for number in keep]


def order_statistics(magnitudes: Magnitudes, places: Sequence[int]) -> list[float]:
    """The magnitudes at some places, counted from 0, of all in ascending order."""
    if magnitudes.count < 4 * SAMPLE:
        return magnitudes.sample()[list(places)].tolist()
    return [cut.magnitude for cut in tops(magnitudes, keep=[magnitudes.count - place for place in places])]


def _by_equals(magnitudes: Magnitudes, sample: NDArray[np.floating], wanted: Sequence[int]) -> dict[int, Cut]:
    """Where many of the sample are equal to what its order tells of a threshold, see if it is that."""
    found = {}
    for keep in wanted:
        value = sample[min(int((1.0 - keep / magnitudes.count) * sample.size), sample.size - 1)]
        first, last = np.searchsorted(sample, value), np.searchsorted(sample, value, side="right")
        if last - first < MANY * sample.size:
            continue
        above, ties = 0, []
        for _, magnitude in magnitudes.pieces():
            above += int(np.count_nonzero(magnitude > value))
            ties.append(int(np.count_nonzero(magnitude == value)))
        if above < keep <= above + sum(ties):
            found[keep] = Cut(float(value), _ties_end(magnitudes, float(value), keep - above, ties))
    return found


@dataclass(frozen=True)
class _Brackets:
    """Finds thresholds that lie where a sample says, with few elements around them.

    margin: half the bracket's width, in standard errors of the sample
    """

    margin: float

    def __call__(self, magnitudes: Magnitudes, sample: NDArray[np.floating], wanted: Sequence[int]) -> dict[int, Cut]:
        count = magnitudes.count
        kind, loops = sample.dtype, chunks.kernels()
        tensors, size = magnitudes.tensors, min(chunks.CHUNK, count)
        brackets = [_bracket(sample, 1.0 - number / count, self.margin) for number in wanted]
        low, high = np.array(brackets, dtype=kind).T.copy()
        searches = [_Search(magnitudes, number) for number in wanted]
        factors = np.empty(0, kind) if magnitudes.rows is None else magnitudes.rows
        above, inside = np.empty((2, len(wanted)), dtype=np.int64)
        pools, flags = np.empty((len(wanted), size + 1), dtype=kind), np.empty(loops.BLOCK, dtype=np.uint8)
        work = chunks.work(tensors, len(tensors) + 2)
        for begin, parts in chunks.pieces(tensors):
            loops.scan(parts, begin, magnitudes.columns, factors, low, high, above, inside, pools, work, flags)
            for number, search in enumerate(searches):
                search.look(int(above[number]), pools[number, : inside[number]])
                if search.is_lost:
                    low[number] = high[number] = inf
            if all(search.is_lost for search in searches):
                break
        found = {search.keep: search.cut() for search in searches}
        return {keep: cut for keep, cut in found.items() if cut}


@dataclass
class _Search:
    """Counts the elements above a bracket, and gathers those inside it."""

    magnitudes: Magnitudes
    keep: int
    above: int = 0
    gathered: int = 0
    inside: list[NDArray[np.floating]] = field(default_factory=list)  # of each piece

    @property
    def is_lost(self) -> bool:
        return self.above >= self.keep or self.gathered > max(MAX_INSIDE * self.magnitudes.count, chunks.CHUNK)

    def look(self, above: int, inside: NDArray[np.floating]) -> None:
        """Go on with a piece's."""
        self.above += above
        self.gathered += inside.size
        self.inside.append(inside.copy())

    def cut(self) -> Cut | None:
        """None if the threshold is not inside."""
        rank = self.keep - self.above  # of the threshold among the gathered, from the largest, from 1
        if self.is_lost or rank > self.gathered:
            return None
        pool = np.concatenate(self.inside)
        pool.sort()  # many of them equal, which a partition takes ten times as long for
        threshold = float(pool[-rank])
        wanted = rank - (pool.size - int(np.searchsorted(pool, threshold, side="right")))  # ties to keep
        ties = [int(np.count_nonzero(part == threshold)) for part in self.inside]
        return Cut(threshold, _ties_end(self.magnitudes, threshold, wanted, ties))


def _bracket(sample: NDArray[np.floating], share: float, margin: float) -> tuple[float, float]:
    """Magnitudes likely just below and just above the one that a share of all elements lies below.

    sample: in ascending order
    margin: in standard errors
    """
    width = margin * sqrt(share * (1.0 - share) / sample.size) + 2.0 / sample.size
    low, high = floor((share - width) * sample.size), ceil((share + width) * sample.size)
    return (
        float(sample[low]) if low >= 0 else 0.0,
        float(sample[high]) if high < sample.size else inf,
    )


def _by_histograms(magnitudes: Magnitudes, sample: NDArray[np.floating], wanted: Sequence[int]) -> dict[int, Cut]:
    return {keep: _by_histogram(magnitudes, keep) for keep in wanted}


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
    if isnan(threshold):  # NaN is beyond all numbers, and is never cut
        return Cut(magnitude=inf, ties_end=0)
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
    ((_, piece),) = magnitudes.pieces(begin, begin + chunks.CHUNK)
    return begin + int(np.flatnonzero(piece == threshold)[within - 1]) + 1
