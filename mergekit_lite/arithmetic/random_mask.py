"""Random masks that depend on nothing but (seed, model, tensor, element).

Each (seed, model, tensor) has a key, each key a stream of random bits addressed by the element's number. So a mask is
the same whatever the order of execution, the number of workers, the other models, or the pieces in which the tensor is
walked.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from wtool.random_bits import RandomBits

LEVELS = 1 << 16  # a density is honoured to the nearest multiple of 1 / LEVELS


def mask_key(seed: int, model: int, tensor: str) -> int:
    """128 bits that name a mask.

    model: the model's place in the recipe, from 0
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{model}/{tensor}".encode(), digest_size=16).digest(), "little")


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
