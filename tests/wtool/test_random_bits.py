"""The stream of a key against numpy's generator itself, from the start and after jumps."""

import numpy as np
import pytest

from wtool.random_bits import RandomBits

KEYS = [0, 7, 2**64 - 1, 2**127 + 5]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("parts", [[0, 4000], [0, 4, 8, 4000], [0, 1, 33, 66, 67, 1023, 4000]])
def test_it_is_what_numpy_draws_in_whatever_pieces(key: int, parts: list[int]) -> None:
    drawn = np.random.PCG64DXSM(key).random_raw(1000).view(np.uint16)
    bits = RandomBits(key)
    pieces = [bits.take(begin, end - begin) for begin, end in zip(parts, parts[1:], strict=False)]
    assert np.array_equal(np.concatenate(pieces), drawn)


@pytest.mark.parametrize("key", KEYS)
def test_it_is_drawn_in_any_order(key: int) -> None:
    drawn = np.random.PCG64DXSM(key).random_raw(1000).view(np.uint16)
    bits = RandomBits(key)
    for begin, count in ((3990, 10), (0, 1), (1000, 7), (8, 4), (3, 2), (4000, 0), (2, 3998)):
        assert np.array_equal(bits.take(begin, count), drawn[begin : begin + count])


def test_far_away() -> None:
    generator = np.random.PCG64DXSM(1)
    generator.advance(10**12)
    assert np.array_equal(RandomBits(1).take(4 * 10**12, 40), generator.random_raw(10).view(np.uint16))
