"""A matrix as the product of two thin ones: the nearest of a rank, exactly or by random projection.

Eckart and Young, "The approximation of one matrix by another of lower rank", 1936: the singular value decomposition
cut off. Its directions are eigenvectors of the smaller of D Dᵀ and Dᵀ D, in float64, which is faster than the
decomposition and as good but for singular values below 1e-8 of the largest.

Halko, Martinsson and Tropp, "Finding structure with randomness: probabilistic algorithms for constructing approximate
matrix decompositions", 2011, https://arxiv.org/abs/0909.4061 (algorithms 4.4 and 5.1): D is seen through a few more
random directions than are wanted, after a few powers of D Dᵀ that bring out its largest. In float32.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .space import Factors

OVERSAMPLED = 10  # random directions beyond the rank
POWERS = 2  # of D Dᵀ
ROUNDING = 1e-9  # a share of the energy that is not missed


@dataclass(frozen=True)
class Directions:
    """What a matrix D does most, on its side with fewer rows or columns."""

    vectors: Tensor  # [n, k], orthonormal
    energies: Tensor  # float64 [k], squares of the singular values, from high to low
    on_left: bool  # directions of D's columns (u), else of its rows (v)


def exact(matrix: Tensor) -> Directions:
    """All directions, in float64; matrix: [out, in]."""
    full = matrix.double()
    on_left = full.shape[0] <= full.shape[1]
    energies, vectors = torch.linalg.eigh(full @ full.t() if on_left else full.t() @ full)
    return Directions(vectors.flip(1), energies.flip(0).clamp(min=0), on_left)


def energies(matrix: Tensor) -> Tensor:
    """Squares of all singular values, float64, from high to low."""
    full = matrix.double()
    gram = full @ full.t() if full.shape[0] <= full.shape[1] else full.t() @ full
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)


def randomized(matrix: Tensor, rank: int, key: int) -> Directions:
    """The `rank` largest directions, nearly.

    key: names the random numbers; the same key gives the same result
    """
    full = matrix.float()
    wide = full if full.shape[0] <= full.shape[1] else full.t()
    seen = min(rank + OVERSAMPLED, wide.shape[0])
    drawn = np.random.Generator(np.random.PCG64DXSM(key)).standard_normal((wide.shape[1], seen), dtype=np.float32)
    basis = torch.linalg.qr(wide @ torch.from_numpy(drawn))[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(wide.t() @ basis)[0]
        basis = torch.linalg.qr(wide @ basis)[0]
    small = (basis.t() @ wide).double()
    found, turn = torch.linalg.eigh(small @ small.t())
    count = min(rank, seen)
    vectors = basis.double() @ turn.flip(1)[:, :count]
    return Directions(vectors, found.flip(0)[:count].clamp(min=0), full.shape[0] <= full.shape[1])


def project(matrix: Tensor, found: Directions, rank: int) -> Factors:
    """The matrix on its first `rank` directions; each column of b is as long as its row of a."""
    full = matrix.double()
    vectors = found.vectors[:, :rank].double()
    other = vectors.t() @ full if found.on_left else vectors.t() @ full.t()  # [rank, …]
    lengths = torch.linalg.vector_norm(other, dim=1)
    half = torch.where(lengths == 0, 1, lengths).sqrt()
    ours, theirs = vectors * half, other / half[:, None]
    return Factors(ours, theirs) if found.on_left else Factors(theirs.t(), ours.t())


def rank_for(found: Tensor, total: float, energy: float) -> int:
    """The lowest rank that keeps a share of the energy, 1 or more; all there are where they do not reach it.

    found:  squares of singular values, from high to low
    total:  the sum of all of them: |D|²
    energy: in (0, 1]
    """
    wanted = (energy - ROUNDING) * total
    sums = accumulate(found.tolist())
    return next((rank for rank, kept in enumerate(sums, 1) if kept >= wanted), max(1, len(found)))
