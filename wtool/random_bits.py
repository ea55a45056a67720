"""Streams of random bits that are the same in whatever pieces, and in whatever order, they are drawn.

A key has a stream of 16 bits an element, addressed by the element's number (O'Neill, "PCG: A family of simple fast
space-efficient statistically good algorithms for random number generation", 2014; numpy's PCG64DXSM, which can jump).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_PER_DRAW = 4  # elements for each 64 bits drawn
_HALF = (1 << 64) - 1


class RandomBits:
    """A key's stream: 16 random bits an element."""

    def __init__(self, key: int):
        self._generator = np.random.PCG64DXSM(key)
        self._origin: Any = self._generator.state
        self._position = 0  # draws taken
        self._state = self._jumped(0)

    def take(self, begin: int, count: int) -> NDArray[np.uint16]:
        """The bits of `count` elements from the one of number `begin`."""
        from wtool.loops import draw

        number, aside = divmod(begin, _PER_DRAW)
        if number != self._position:
            self._state = self._jumped(number)
        found = np.empty(-(-(aside + count) // _PER_DRAW), dtype=np.uint64)
        draw(self._state, found)
        self._position = number + found.size
        return found.view(np.uint16)[aside : aside + count]

    def _jumped(self, draws: int) -> NDArray[np.uint64]:
        """The generator's state after so many draws, and its increment, each in two halves, the upper one first."""
        self._generator.state = self._origin
        if draws:
            self._generator.advance(draws)
        state: Any = self._generator.state["state"]
        halves = [half for number in (state["state"], state["inc"]) for half in (number >> 64, number & _HALF)]
        return np.array(halves, dtype=np.uint64)
