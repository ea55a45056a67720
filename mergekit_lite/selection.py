"""Finding the k elements of a task vector with the largest magnitude, without sorting it and without holding it.

The threshold is the k-th largest magnitude. A sample of the elements tells a narrow bracket around it; one walk
counts the elements above the bracket and gathers the few inside, among which the threshold is found exactly.
Where the sample misled (or too many elements are inside, as with many equal values), two walks with histograms
over the halves of the float's bits find it exactly in constant memory.

Ties at the threshold are broken by position: earlier elements are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lite import chunks

SAMPLE_RUNS = 128
SAMPLE_RUN = 256  # consecutive elements, to touch little memory
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
    n = model.numel()
    if keep >= n:
        return Cut(magnitude=-1.0, ties_end=n)
    low, high = _bracket(base, model, keep)
    above, gathered, inside = 0, 0, []
    most_inside = max(MAX_INSIDE * n, chunks.CHUNK)
    is_above, is_inside = np.empty(chunks.CHUNK, dtype=bool), np.empty(chunks.CHUNK, dtype=bool)
    for _, magnitude in _magnitudes(base, model):
        over = np.greater(magnitude, high, out=is_above[: magnitude.size])
        within = np.greater_equal(magnitude, low, out=is_inside[: magnitude.size])
        above += int(np.count_nonzero(over))
        inside.append(magnitude[np.not_equal(within, over, out=within)])
        gathered += inside[-1].size
        if above > keep or gathered > most_inside:
            return _by_histogram(base, model, keep)
    rank = keep - above  # of the threshold among the gathered, from the largest, from 1
    if rank < 1 or rank > gathered:
        return _by_histogram(base, model, keep)
    pool = np.concatenate(inside)
    threshold = float(np.partition(pool, gathered - rank)[gathered - rank])
    wanted = rank - int(np.count_nonzero(pool > threshold))  # ties to keep
    return Cut(threshold, _ties_end(base, model, threshold, wanted, [int((p == threshold).sum()) for p in inside]))


def _magnitudes(base: Tensor, model: Tensor) -> Iterator[tuple[int, NDArray[np.floating]]]:
    """Yield (first element, |model - base|) piece by piece; the memory is used again."""
    for begin, (b, m) in chunks.pieces([base, model]):
        yield begin, m.sub_(b).abs_().numpy()


def _bracket(base: Tensor, model: Tensor, keep: int) -> tuple[float, float]:
    """Magnitudes that very likely lie just below and just above the threshold."""
    n = model.numel()
    kind = chunks.working_type([base, model])
    if n <= 4 * SAMPLE_RUNS * SAMPLE_RUN:
        return 0.0, inf
    starts = np.linspace(0, n - SAMPLE_RUN, SAMPLE_RUNS).astype(np.int64)
    flat_base, flat_model = base.reshape(-1), model.reshape(-1)
    runs = [flat_model[s : s + SAMPLE_RUN].to(kind) - flat_base[s : s + SAMPLE_RUN].to(kind) for s in starts.tolist()]
    sample = np.sort(torch.cat(runs).abs_().numpy())
    share = 1.0 - keep / n  # of the elements below the threshold
    margin = 6.0 * sqrt(share * (1.0 - share) / sample.size) + 2.0 / sample.size  # neighbours are alike: be generous
    low, high = floor((share - margin) * sample.size), ceil((share + margin) * sample.size)
    return (
        float(sample[low]) if low >= 0 else 0.0,
        float(sample[high]) if high < sample.size else inf,
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
