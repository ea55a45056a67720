"""Finding the k elements of the largest magnitude, without sorting and without holding the magnitudes.

A magnitude is what a method ranks elements by (the size of a task vector, the variance over models), computed block
by block. The threshold is the k-th largest. A sample of the elements tells a narrow bracket around it; one walk
counts the elements above the bracket and gathers the few inside, among which the threshold is found exactly. Where
the sample misled, a wider bracket is tried. Where that fails too, two walks with histograms over the halves of the
float's bits find it exactly in constant memory. Fine-tunings stored in 16 bits differ from their base by few different
amounts: where many of the sample are equal to the one at the threshold's place in it, the bracket is that number, and
those equal to it are only counted.

Ties at the threshold are broken by position: earlier elements are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, inf, sqrt

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

Bracket = tuple[float, float]
"""Two magnitudes, between which a threshold is likely to be."""


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
        for bracket in (_likely, _certain, lambda _, __, number: _exact(magnitudes, number)):
            if wanted := sorted({number for number in keep if number not in found}):
                found |= _search(magnitudes, {number: bracket(sample, count, number) for number in wanted})
    return [found.get(number, Cut(magnitude=inf, ties_end=0)) for number in keep]  # NaN, above all, is never cut


def order_statistics(magnitudes: Magnitudes, places: Sequence[int]) -> list[float]:
    """The magnitudes at some places, counted from 0, of all in ascending order."""
    if magnitudes.count < 4 * SAMPLE:
        return magnitudes.sample()[list(places)].tolist()
    return [cut.magnitude for cut in tops(magnitudes, keep=[magnitudes.count - place for place in places])]


def _search(magnitudes: Magnitudes, brackets: Mapping[int, Bracket]) -> dict[int, Cut]:
    """Cuts to some numbers of elements whose thresholds are within their brackets, in one walk; none of others."""
    loops, tensors, count = chunks.kernels(), magnitudes.tensors, magnitudes.count
    kind = chunks.empty(tensors).dtype
    low, high = np.array([*brackets.values()], dtype=kind).T.copy()
    most = np.array([*brackets])
    above, inside = np.zeros((2, len(most)), dtype=np.int64)
    room = int(MAX_INSIDE * count) if (low < high).any() else 0
    pools = np.empty((len(most), room + loops.BLOCK + 1), dtype=kind)  # of which what is not filled takes no memory
    ends = np.empty((len(most), -(-count // loops.SEGMENT)), dtype=np.int64)
    factors = np.empty(0, kind) if magnitudes.rows is None else magnitudes.rows
    columns, work = magnitudes.columns, chunks.work(tensors, len(tensors) + 2)
    flags = np.zeros(loops.BLOCK, dtype=np.uint8)
    for begin, parts in chunks.spans(tensors):
        loops.scan(parts, begin, columns, factors, low, high, most, above, inside, pools, ends, work, flags)
    found: dict[int, Cut] = {}
    for number, keep in enumerate(brackets):
        rank = keep - int(above[number])  # of the threshold among those inside, from the largest, from 1
        if 0 < rank <= inside[number]:
            pool = pools[number, : inside[number]] if low[number] < high[number] else None
            found[keep] = _cut(magnitudes, float(low[number]), pool, ends[number], rank)
    return found


def _cut(
    magnitudes: Magnitudes, number: float, pool: NDArray[np.floating] | None, ends: NDArray[np.int64], rank: int
) -> Cut:
    """The cut at one of those inside a bracket.

    number: what all inside are equal to, if there is no pool
    ends:   how many are inside up to the end of each segment
    rank:   from the largest, from 1
    """
    if pool is not None:
        order = np.sort(pool)  # many of them equal, which a partition takes ten times as long for
        threshold = order[-rank]  # of the array's type, of which else all would be converted
        rank -= order.size - int(np.searchsorted(order, threshold, side="right"))  # now among those equal to it
        number = float(threshold)
        del order
        ends = np.cumsum([np.count_nonzero(pool[a:b] == number) for a, b in pairwise([0, *ends])])
    if rank == ends[-1]:
        return Cut(number, magnitudes.count)
    segment = int(np.searchsorted(ends, rank))  # where the last equal one that is kept is
    within = rank - (int(ends[segment - 1]) if segment else 0)
    begin, size = segment * chunks.kernels().SEGMENT, chunks.kernels().SEGMENT
    equal = np.concatenate([piece == number for _, piece in magnitudes.pieces(begin, begin + size)])
    return Cut(number, begin + int(np.flatnonzero(equal)[within - 1]) + 1)


def _likely(sample: NDArray[np.floating], count: int, keep: int) -> Bracket:
    """A bracket that is as narrow as can be, or the very number, of the threshold unless the sample misleads.

    sample: in ascending order
    count:  of all elements
    keep:   of them are not below the threshold
    """
    value = sample[min(sample.size - keep * sample.size // count, sample.size - 1)]
    equal = np.searchsorted(sample, value, side="right") - np.searchsorted(sample, value)
    if sample.size == count or equal >= MANY * sample.size:
        return float(value), float(value)
    return _around(sample, keep / count, MARGINS[0])


def _certain(sample: NDArray[np.floating], count: int, keep: int) -> Bracket:
    """A wider one."""
    return _around(sample, keep / count, MARGINS[1])


def _around(sample: NDArray[np.floating], share: float, margin: float) -> Bracket:
    """margin: half the width, in standard errors"""
    width = margin * sqrt(share * (1.0 - share) / sample.size) + 2.0 / sample.size
    low, high = floor((1.0 - share - width) * sample.size), ceil((1.0 - share + width) * sample.size)
    return (
        float(sample[low]) if low >= 0 else 0.0,
        float(sample[high]) if high < sample.size else inf,
    )


def _exact(magnitudes: Magnitudes, keep: int) -> Bracket:
    """The threshold itself, digit by digit in the bits of the magnitudes, which sort as their values do."""
    prefix, left = 0, keep
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
    return threshold, threshold
