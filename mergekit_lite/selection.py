"""Finding the k elements of a task vector with the largest magnitude, without sorting it and without holding it.

The threshold is the k-th largest magnitude. A sample of the elements tells a narrow bracket around it; one walk
counts the elements above the bracket and gathers the few inside, among which the threshold is found exactly. Where
the sample misled, a wider bracket is tried. Where that fails too (or too many elements are inside, as with many equal
values), two walks with histograms over the halves of the float's bits find it exactly in constant memory.

Ties at the threshold are broken by position: earlier elements are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt

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
    """Which elements are kept: |d| > magnitude, and |d| == magnitude before element `ties_end`."""

    magnitude: float
    ties_end: int


def largest(base: Tensor, model: Tensor, *, keep: int) -> Cut:
    """Find the `keep` elements of largest |model - base|, computed in the working type.

    keep: between 1 and the number of elements
    """
    if keep >= model.numel():
        return Cut(magnitude=-1.0, ties_end=model.numel())
    sample = _sample(base, model)
    for margin in MARGINS:
        if cut := _by_bracket(base, model, keep, *_bracket(sample, 1.0 - keep / model.numel(), margin)):
            return cut
    return _by_histogram(base, model, keep)


def _by_bracket(base: Tensor, model: Tensor, keep: int, low: float, high: float) -> Cut | None:
    """Find the threshold if it lies between two magnitudes that few elements lie between; else None."""
    above, gathered, inside = 0, 0, []
    most_inside = max(MAX_INSIDE * model.numel(), chunks.CHUNK)
    is_above, is_inside = np.empty(chunks.CHUNK, dtype=bool), np.empty(chunks.CHUNK, dtype=bool)
    for _, magnitude in _magnitudes(base, model):
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
    return Cut(threshold, _ties_end(base, model, threshold, wanted, [int((p == threshold).sum()) for p in inside]))


def _magnitudes(base: Tensor, model: Tensor) -> Iterator[tuple[int, NDArray[np.floating]]]:
    """Yield (first element, |model - base|) piece by piece; the memory is used again."""
    for begin, (b, m) in chunks.pieces([base, model]):
        yield begin, m.sub_(b).abs_().numpy()


def _sample(base: Tensor, model: Tensor) -> NDArray[np.floating]:
    """Magnitudes of runs of elements spread evenly over the task vector; of all where they are few."""
    kind = chunks.working_type([base, model])
    flat = base.reshape(-1), model.reshape(-1)
    runs = SAMPLE // SAMPLE_RUN
    if model.numel() >= 4 * SAMPLE:
        stride = model.numel() // runs - 1 | 1  # odd, so that the runs do not stand below each other in a matrix
        flat = [part[: runs * stride].view(runs, stride)[:, :SAMPLE_RUN] for part in flat]
    b, m = (part.to(kind) for part in flat)
    return (m - b).abs_().reshape(-1).numpy()


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


def _by_histogram(base: Tensor, model: Tensor, keep: int) -> Cut:
    """Find the threshold digit by digit in the bits of the magnitudes, which sort as their values do."""
    prefix, left, shift = 0, keep, 0
    bits = torch.finfo(chunks.working_type([base, model])).bits
    integer = np.uint32 if bits == 32 else np.uint64
    for shift in range(bits - 16, -1, -16):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for _, magnitude in _magnitudes(base, model):
            digits: NDArray[np.unsignedinteger] = magnitude.view(integer) >> integer(shift)
            digits = digits[(digits >> integer(16)) == integer(prefix)] & integer(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        from_top = np.cumsum(counts[::-1])  # elements with this digit or a larger one
        steps = int(np.searchsorted(from_top, left))
        left -= int(from_top[steps - 1]) if steps else 0
        prefix = prefix << 16 | (0xFFFF - steps)
    threshold = float(np.array([prefix], dtype=integer).view(np.float32 if bits == 32 else np.float64)[0])
    ties = [int(np.count_nonzero(magnitude == threshold)) for _, magnitude in _magnitudes(base, model)]
    return Cut(threshold, _ties_end(base, model, threshold, left, ties))


def _ties_end(base: Tensor, model: Tensor, threshold: float, wanted: int, ties: list[int]) -> int:
    """The element before which exactly `wanted` magnitudes equal the threshold.

    ties: how many there are in each piece
    """
    n = model.numel()
    if wanted == sum(ties):
        return n
    number = int(np.searchsorted(np.cumsum(ties), wanted))
    begin = number * chunks.CHUNK
    rows = slice(begin, min(begin + chunks.CHUNK, n))
    (_, magnitude), *_ = _magnitudes(base.reshape(-1)[rows], model.reshape(-1)[rows])
    within = wanted - sum(ties[:number])
    return begin + int(np.flatnonzero(magnitude == threshold)[within - 1]) + 1
