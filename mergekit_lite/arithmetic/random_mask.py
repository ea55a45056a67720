"""Random masks that depend on nothing but (seed, model, tensor, element).

Each (seed, model, tensor) has a key, each key a stream of 16 random bits an element, addressed by the element's
number (O'Neill, "PCG: A family of simple fast space-efficient statistically good algorithms for random number
generation", 2014; numpy's PCG64DXSM, which can jump). So a mask is the same whatever the order of execution, the
number of workers, the other models, or the pieces in which the tensor is walked.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

LEVELS = 1 << 16  # a density is honoured to the nearest multiple of 1 / LEVELS
_PER_DRAW = 4  # elements for each 64 bits drawn


def mask_key(seed: int, model: int, tensor: str) -> int:
    """128 bits that name a mask.

    model: the model's place in the recipe, from 0
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{model}/{tensor}".encode(), digest_size=16).digest(), "little")


class RandomBits:
    """A key's stream: 16 random bits an element."""

    def __init__(self, key: int):
        self._stream = np.random.PCG64DXSM(key)
        self._origin = self._stream.state
        self._position = 0  # draws taken

    def take(self, begin: int, count: int) -> NDArray[np.uint16]:
        """The bits of `count` elements from the one of number `begin`."""
        draw, aside = divmod(begin, _PER_DRAW)
        if draw != self._position:
            self._stream.state = self._origin
            self._stream.advance(draw)
        draws = -(-(aside + count) // _PER_DRAW)
        self._position = draw + draws
        return self._stream.random_raw(draws).view(np.uint16)[aside : aside + count]


class RandomMask:
    """Keeps each element with probability `density`.

    density: in [0, 1]; `effective` is what it is rounded to
    """

    def __init__(self, key: int, density: float):
        self._level = round(density * LEVELS)
        self.effective = self._level / LEVELS
        self._bits = RandomBits(key)

    def take(self, begin: int, count: int) -> NDArray[np.bool_]:
        """Whether elements are kept.

        begin: the number of the first element
        """
        if self._level == LEVELS:
            return np.ones(count, dtype=bool)
        return self._bits.take(begin, count) < self._level
