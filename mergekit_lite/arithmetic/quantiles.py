"""Order statistics of many numbers that come in pieces, exact, without sorting or holding them.

A float's upper 16 bits, read as a number, sort non-negative floats into bins: one walk counts them, which tells the
bins the wanted places fall into; another gathers these bins' elements, among which the places are found. A bin holds a
hundredth of the elements or so, and all of them only where they are nearly equal.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Pieces = Callable[[], Iterable[NDArray[np.float32]]]
"""A walk through non-negative float32 numbers, the same each time."""


def order_statistics(walk: Pieces, ranks: Sequence[int]) -> list[float]:
    """Return the values at some places, counted from 0, of the numbers in ascending order."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for piece in walk():
        counts += np.bincount(_bins(piece), minlength=1 << 16)
    ends = np.cumsum(counts)
    wanted = [int(found) for found in np.searchsorted(ends, ranks, side="right")]
    inside: dict[int, list[NDArray[np.float32]]] = {number: [] for number in wanted}
    for piece in walk():
        bins = _bins(piece)
        for number, gathered in inside.items():
            gathered.append(piece[bins == number])
    pools = {number: np.concatenate(gathered) for number, gathered in inside.items()}
    places = [rank - int(ends[number] - counts[number]) for rank, number in zip(ranks, wanted, strict=True)]
    return [float(np.partition(pools[number], place)[place]) for number, place in zip(wanted, places, strict=True)]


def _bins(piece: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(piece).view(np.uint16)[1::2]  # the upper half of a little-endian float
