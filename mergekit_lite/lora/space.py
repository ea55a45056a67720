"""Arithmetic on low-rank updates that never makes the full matrix: sums, cuts, and merging in a shared space.

An update is a product B A, with B [out, r] and A [r, in]; r may be 0, which is no update at all. N updates of
ranks r_1 … r_N have T = r_1 + … + r_N directions at most, so everything is done on matrices with T rows or columns.

KnOTS: Stoica, Ramesh, Ecsedi, Choshen and Hoffman, "Model merging with SVD to tie the KnOTS", 2024,
https://arxiv.org/abs/2410.19735. With D_i = B_i A_i side by side,

    [D_1 … D_N] = U S [V_1ᵀ … V_Nᵀ],    D = U S merge(V_1ᵀ, …, V_Nᵀ)

Core Space: Panariello, Marczak, Magistri, Porrello, Twardowski, Bagdanov, Calderara and van de Weijer, "Accurate and
efficient low-rank model merging in core space", 2025, https://arxiv.org/abs/2509.17786. With U the left singular
vectors of [B_1 … B_N] and V the right ones of the A_i upon one another,

    M_i = Uᵀ B_i A_i V,    D = U merge(M_1, …, M_N) Vᵀ

Both lose nothing where the merge is linear: then they give the sum. Signs of singular vectors are arbitrary, and no
merge here depends on them. All is float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

Merge = Callable[[Sequence[Tensor]], Tensor]
"""Matrices of one shape, one an adapter, to one: element by element."""


@dataclass(frozen=True)
class Factors:
    """b @ a is an update of a matrix."""

    b: Tensor  # float64 [out, r]
    a: Tensor  # float64 [r, in]


def add(updates: Sequence[Factors], weight: Sequence[float]) -> Factors:
    """The weighted sum, exactly: factors side by side, so that ranks add up."""
    return Factors(
        torch.cat([w * update.b for update, w in zip(updates, weight, strict=True)], 1),
        torch.cat([update.a for update in updates], 0),
    )


def cut(update: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest update of a lower rank (Eckart and Young, 1936), through QR of both factors.

    rank: 1 or more; what an update lacks to it is filled up with zeros
    returns: the factors, each column of b as long as its row of a; and |cut - update| / |update|, 0 where it is zero
    """
    left, upper = torch.linalg.qr(update.b)
    right, lower = torch.linalg.qr(update.a.t())
    u, s, v = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    total = float(s.square().sum())
    error = sqrt(float(s[rank:].square().sum()) / total) if total else 0.0
    half = s[:rank].sqrt()
    return filled(Factors(left @ (u[:, :rank] * half), (half[:, None] * v[:rank]) @ right.t()), rank), error


def knots(updates: Sequence[Factors], merge: Merge) -> Factors:
    """Merge in the basis that all updates share on the side of the outputs.

    returns: factors of rank min(T, out) at most
    """
    basis, upper = torch.linalg.qr(torch.cat([update.b for update in updates], 1))
    parts = torch.split(upper, [update.b.shape[1] for update in updates], dim=1)
    aligned = [part @ update.a for part, update in zip(parts, updates, strict=True)]  # D_i = basis @ aligned_i
    turn, s = _left(torch.cat(aligned, 1))
    merged = merge([(turn.t() @ part) / s[:, None] for part in aligned])
    half = s.sqrt()
    return Factors(basis @ (turn * half), half[:, None] * merged)


def core_space(updates: Sequence[Factors], merge: Merge) -> Factors:
    """Merge small matrices, each an update seen in the bases that all share on both sides.

    returns: factors of rank min(T, out, in) at most
    """
    left, _ = _left(torch.cat([update.b for update in updates], 1))
    right, _ = _left(torch.cat([update.a for update in updates], 0).t())
    merged = merge([(left.t() @ update.b) @ (update.a @ right) for update in updates])
    if left.shape[1] <= right.shape[1]:
        return Factors(left, merged @ right.t())
    return Factors(left @ merged, right.t().contiguous())


def filled(update: Factors, rank: int) -> Factors:
    """An update of a rank told, with zeros for the directions it lacks."""
    lacking = rank - update.b.shape[1]
    if lacking <= 0:
        return update
    return Factors(
        torch.cat([update.b, update.b.new_zeros(update.b.shape[0], lacking)], 1),
        torch.cat([update.a, update.a.new_zeros(lacking, update.a.shape[1])], 0),
    )


def _left(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors that a matrix uses, and their values; none of a matrix of zeros."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    floor = max(matrix.shape) * torch.finfo(s.dtype).eps * (float(s[0]) if s.numel() else 0.0)
    used = int((s > floor).sum())
    return u[:, :used], s[:used]
