"""Inner loops that several rooms need, compiled by numba."""

import numpy as np

from wtool.compiled import bits, compiled, upper_product

_MULTIPLIER = np.uint64(0xDA942042E4DD58B5)


@compiled
def draw(state, out):
    """Fill with what PCG64DXSM draws next: its "cheap multiplier", and its output of the state before each step.

    state: the generator's state and its increment, each in two halves, the upper one first; it goes on
    """
    high, low, more_high, more_low = state
    one, half, most = np.uint64(1), np.uint64(32), np.uint64(48)
    for i in range(out.size):
        mixed = high ^ (high >> half)
        mixed *= _MULTIPLIER
        mixed ^= mixed >> most
        out[i] = mixed * (low | one)
        high = high * _MULTIPLIER + upper_product(low, _MULTIPLIER) + more_high
        low = low * _MULTIPLIER + more_low
        high += np.uint64(low < more_low)
    state[0], state[1] = high, low


@compiled
def shake(numbers, noise, dropped, largest):
    """Add random bits below those that a shorter type keeps, and drop what is there then.

    numbers: float32
    noise:   16 random bits for each
    dropped: bits of the mantissa that the type has not, 16 at most
    largest: numbers that are not below it in magnitude stay as they are
    """
    down, kept, largest = np.uint32(16 - dropped), ~np.uint32((1 << dropped) - 1), np.float32(largest)
    for i in range(numbers.size):
        number = numbers[i]
        moved = bits((bits(number) + (np.uint32(noise[i]) >> down)) & kept)
        numbers[i] = moved if abs(number) < largest else number


@compiled
def shake_to_bfloat16(numbers, noise, largest, out):
    """The same for bfloat16, and written as its bits; numbers that are not below the largest go to the nearest."""
    half, one, most, largest = np.uint32(0x7FFF), np.uint32(1), np.uint32(16), np.float32(largest)
    for i in range(numbers.size):
        number = numbers[i]
        given = bits(number)
        nearest = np.uint32(given + half + ((given >> most) & one))
        nearest = nearest if number == number else np.uint32(0x7FC00000)
        moved = np.uint32(given + np.uint32(noise[i]))
        out[i] = (moved if abs(number) < largest else nearest) >> most
