"""Low rank: a matrix as the product of a tall and a wide one, best for its weights or for its outputs.

The product nearest to the weights is the singular value decomposition cut off (Eckart and Young, 1936). The one with
the nearest outputs is SVD-LLM's: Wang, Zheng, Wan and Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition
for Large Language Model Compression", 2024, https://arxiv.org/abs/2403.07378. With G the mean of x xᵀ and G = C Cᵀ,

    W C = U diag(σ) Vᵀ,    W' = U_r diag(σ_r) V_rᵀ C⁻¹,    mean of |W x - W' x|² = Σ of the σ² that were dropped

As U_r diag(σ_r) V_rᵀ = U_r U_rᵀ W C, it is W' = U_r (U_rᵀ W): the outputs on the r directions they spread most along.
These are eigenvectors of W G Wᵀ and σ² its eigenvalues, so nothing is inverted, and a G of low rank needs no damping.
All is float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from wtool.errors import UsageError


@dataclass(frozen=True)
class Spectrum:
    """How the outputs of a matrix spread."""

    directions: Tensor  # U, float64 [out, n], n = min(out, in), orthonormal
    energies: Tensor  # σ², float64 [n], mean square of the outputs along each, from high to low, at least 0


@dataclass(frozen=True)
class Factors:
    """u @ v stands for a matrix; a column of u is as long as its row of v."""

    u: Tensor  # [out, r]
    v: Tensor  # [r, in]


def spectrum(weight: Tensor, gram: Tensor | None = None) -> Spectrum:
    """Find the directions to keep.

    weight: [out, in], of any float type
    gram:   [in, in], mean of x xᵀ over calibration tokens; None asks for the nearest weights instead of outputs
    """
    exact = weight.double()
    basis, core = None, exact
    if exact.shape[0] > exact.shape[1]:  # in the space that outputs can reach, eigenvectors are found faster
        basis, core = torch.linalg.qr(exact)
    spread = core @ core.t() if gram is None else core @ gram.double() @ core.t()
    energies, directions = torch.linalg.eigh((spread + spread.t()) / 2)
    count = min(exact.shape)
    directions = directions.flip(1)[:, :count]
    directions = directions if basis is None else basis @ directions
    return Spectrum(directions, energies.flip(0)[:count].clamp(min=0))


def truncate(weight: Tensor, found: Spectrum, rank: int) -> Factors:
    """The matrix with `rank` directions of its outputs, 1 to min(out, in), in its own type."""
    u = found.directions[:, :rank]
    v = u.t() @ weight.double()
    length = torch.linalg.vector_norm(v, dim=1).sqrt()  # u has length 1
    length = torch.where(length == 0, 1, length)
    return Factors((u * length).to(weight.dtype), (v / length[:, None]).to(weight.dtype))


def break_even(shape: tuple[int, int]) -> int:
    """The highest rank at which factors hold fewer numbers than the matrix [out, in]; 0 where there is none."""
    rows, columns = shape
    return (rows * columns - 1) // (rows + columns)


def rank_of(shape: tuple[int, int], ratio: float) -> int | None:
    """The rank at which factors hold `ratio` of a matrix's parameters, at least 1.

    ratio:   in (0, 1]
    returns: None where the matrix itself holds no more

    raises: UsageError for another ratio
    """
    _check(ratio)
    rows, columns = shape
    rank = max(1, int(ratio * rows * columns / (rows + columns)))
    return rank if rank <= break_even(shape) else None


def allocate(
    energies: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], ratio: float, *, relative: bool = False
) -> dict[str, int | None]:
    """The rank of each matrix, where parameters are spent on the directions with the most energy for each of them.

    energies: name -> σ² [n], from high to low
    shapes:   name -> (out, in)
    ratio:    of the parameters of all matrices that may be spent, in (0, 1]
    relative: energies as shares of their matrix's, so that no matrix counts more for having larger outputs

    returns: name -> rank, at least 1 each whatever the ratio; None where a matrix stays as it is
    raises: UsageError for another ratio
    """
    _check(ratio)
    ranks: dict[str, int | None] = {name: 1 if break_even(shape) else None for name, shape in shapes.items()}
    left = int(ratio * sum(map(prod, shapes.values()))) - sum(cost(shapes[name], ranks[name]) for name in shapes)
    for name in _by_worth(energies, shapes, relative):
        rank, shape = ranks[name], shapes[name]
        if rank is None:
            continue
        following = None if rank == break_even(shape) else rank + 1
        more = cost(shape, following) - cost(shape, rank)
        if more <= left:
            ranks[name], left = following, left - more
    return ranks


def cost(shape: tuple[int, int], rank: int | None) -> int:
    """Parameters of a matrix [out, in] at a rank; None is the matrix as it is."""
    return prod(shape) if rank is None else rank * sum(shape)


def _by_worth(energies: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], relative: bool) -> list[str]:
    """Names, once for every direction after the first, those of the most energy for their parameters first."""
    worth = []
    for name, shape in shapes.items():
        total = float(energies[name].sum()) if relative else 1.0
        scale = (total or 1.0) * sum(shape)
        worth += [(-energy / scale, name) for energy in energies[name][1:].tolist()]
    return [name for _, name in sorted(worth, key=lambda entry: entry[0])]


def _check(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise UsageError(f"rank ratio {ratio:g} is not a share of the parameters to keep, above 0 and at most 1")
