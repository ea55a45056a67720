"""Hadamard matrices, and rotations made of them.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows. Divided by the root of its size it is the rotation that
spreads one channel over all of them evenly, which is why it takes outliers away: QuIP# (Tseng et al., 2024,
https://arxiv.org/abs/2402.04396), QuaRot (Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456), SpinQuant (Liu et
al., 2024, https://arxiv.org/abs/2405.16406). With random signs before it (Q = diag(s) H / sqrt n) no direction that a
model has learnt is likely to be one of its rows.

Sizes: Sylvester's doubling (H and H over H and -H) of 1, or of a matrix by Paley, "On orthogonal matrices", 1933: where
q is a power of an odd prime and X(a) is 1 for squares of the field of q elements, -1 for other elements and 0 for 0,

    q = 3 mod 4:  I + [[0, 1], [-1, X(i - j)]]                                            has q + 1 rows
    q = 1 mod 4:  S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], S = [[0, 1], [1, X(i - j)]]   has 2 q + 2

Primes and squares of primes are taken here. That leaves 92, 116, 156, 172, 184, 188, 232 and 236 of the multiples of 4
up to 256. Such a size is turned in blocks, if they are of `BLOCK` at least, or else by a random orthogonal matrix.
"""

from dataclasses import dataclass
from math import isqrt, prod, sqrt

import torch
from torch import Tensor

from wtool.rotation import Dense, Turn
from wtool.writer import checksum

LARGEST = 1024  # size of a matrix by Paley
PIECE = 64  # size of a power of two that is multiplied with at a time
BLOCK = 128  # blocks of fewer channels than that spread too little


@dataclass(frozen=True, eq=False)
class Hadamard:
    """x -> x diag(s) H / sqrt(size of H), where H may stand in several blocks along the diagonal."""

    signs: Tensor  # float64 [size], 1 or -1
    factors: tuple[Tensor, ...]  # float64; H is their Kronecker product

    def __call__(self, rows: Tensor) -> Tensor:
        sizes = [len(factor) for factor in self.factors]
        lies = (rows * self.signs).reshape(-1, *sizes)
        for axis, factor in enumerate(self.factors, start=1):
            lies = (lies.movedim(axis, -1) @ factor).movedim(-1, axis)
        return lies.reshape(rows.shape) / sqrt(prod(sizes))

    @property
    def digest(self) -> str:
        return checksum(torch.cat([self.signs, *(factor.flatten() for factor in self.factors)]))


def hadamard_factors(size: int) -> tuple[Tensor, ...] | None:
    """Hadamard matrices whose Kronecker product has a size; None where none is known here.

    returns: float64 [n, n] each, with entries of 1 and -1
    """
    doublings = (size & -size).bit_length() - 1
    for power in range(doublings, -1, -1):
        base = torch.ones(1, 1).double() if size >> power == 1 else paley(size >> power)
        if base is not None:
            return (base, *_sylvester(power))
    return None


def paley(size: int) -> Tensor | None:
    """A Hadamard matrix by one of Paley's constructions; None where there is none, or it is larger than `LARGEST`."""
    if size % 4 or size > LARGEST:
        return None
    if (size - 1) % 4 == 3 and (found := _characters(size - 1)) is not None:
        return torch.eye(size).double() + _bordered(found, -1)
    half = size // 2
    if (half - 1) % 4 == 1 and (found := _characters(half - 1)) is not None:
        signs, rest = torch.tensor([[1, 1], [1, -1]]).double(), torch.tensor([[1, -1], [-1, -1]]).double()
        return torch.kron(_bordered(found, 1), signs) + torch.kron(torch.eye(half).double(), rest)
    return None


def random_turn(size: int, seed: int) -> Turn:
    """A rotation of a size: Hadamard with random signs, in blocks if need be, or a random orthogonal matrix.

    seed: the same gives the same rotation (an orthogonal matrix up to rounding, between machines)
    """
    generator = torch.Generator().manual_seed(seed)
    block = block_size(size)
    if block is None:
        found = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        return Dense(found.Q * found.R.diagonal().sign())
    factors = hadamard_factors(block)
    assert factors is not None
    return Hadamard(torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1, factors)


def block_size(size: int) -> int | None:
    """The size of the Hadamard matrices that channels are turned by; None for a random orthogonal matrix."""
    known = (size // parts for parts in range(1, size + 1) if size % parts == 0 and _is_known(size // parts))
    largest = next(known)  # 1 at least
    return largest if largest == size or largest >= BLOCK else None


def in_words(size: int) -> str:
    """What `random_turn` makes of a size."""
    block = block_size(size)
    if block is None:
        return f"a random orthogonal matrix of {size} (no Hadamard matrix of that size is known here)"
    if block < size:
        return f"{size // block} Hadamard matrices of {block} (none of {size} is known here)"
    return f"a Hadamard matrix of {size}"


def _is_known(size: int) -> bool:
    return hadamard_factors(size) is not None


def _sylvester(power: int) -> list[Tensor]:
    """2 ** power as a product of few matrices of at most `PIECE`."""
    found: list[Tensor] = []
    while power:
        step = min(power, PIECE.bit_length() - 1)
        matrix = torch.ones(1, 1).double()
        for _ in range(step):
            matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]]).double())
        found.append(matrix)
        power -= step
    return found


def _bordered(inner: Tensor, left: int) -> Tensor:
    """[[0, 1], [left, inner]]"""
    found = torch.ones(len(inner) + 1, len(inner) + 1).double()
    found[0, 0], found[1:, 0], found[1:, 1:] = 0, left, inner
    return found


def _characters(order: int) -> Tensor | None:
    """X(i - j) over the field of `order` elements, [order, order]; None where that is neither a prime nor its square.

    In the field of p² elements they are a + b √n with n no square modulo p, here in the order of a + p b.
    """
    prime = isqrt(order) if isqrt(order) ** 2 == order else order
    if prime < 3 or any(prime % divisor == 0 for divisor in range(2, isqrt(prime) + 1)):
        return None
    squares = {number * number % prime for number in range(prime)}
    nonsquare = next(number for number in range(prime) if number not in squares)
    numbers = torch.arange(order)
    a, b = numbers % prime, numbers // prime
    values = -torch.ones(order).double()
    values[(a * a + nonsquare * b * b) % prime + prime * (2 * a * b % prime)] = 1
    values[0] = 0
    return values[(a[:, None] - a) % prime + prime * ((b[:, None] - b) % prime)]
