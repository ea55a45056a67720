"""Merging by lengths and angles: one linear combination of the models' vectors, found from their Gram matrix.

Every length of, and angle between, linear combinations of N vectors follows from the N x N matrix of their dot
products. So a method on the sphere takes two walks through the tensors, one for the Gram matrix (in float64: the
angle between two tunings of one model is small, and its cosine near 1) and one for the combination; what lies between
is arithmetic on N x N numbers, however many steps it has.

A vector is a tensor, or each row or column of it. By rows one walk does both, as a row is in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from wtool.pieces import Pieces

from ..methods.linear import linear
from . import chunks
from .task_vectors import WHOLE, merge_task_vectors

PIECE = 1 << 16  # elements whose float64 copies, of a few tensors, fit the cache
Factors = Callable[[Tensor], Tensor]
"""From Gram matrices [vectors, N, N] to what each model's vectors are multiplied by [vectors, N], both in float64."""


def combine(
    base: Tensor | None,
    models: Sequence[Tensor],
    factors: Factors,
    *,
    axis: int | None = None,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """sum_i f_i x_i, or with a base theta_0 + sum_i f_i (x_i - theta_0).

    factors: f from the Gram matrix of the vectors (of their differences to the base)
    axis:    along which the vectors lie (-1: rows); None, and tensors of less than two axes: the whole tensor is one
    dtype:   of the result; the inputs' (promoted) if None
    """
    if axis is not None and models[0].ndim > 1:
        axis %= models[0].ndim
        if axis == models[0].ndim - 1:
            return _combine_rows(base, models, factors, dtype)
        return _combine_across(base, models, factors, axis, dtype)
    shares = factors(gram(base, models)[None])[0].tolist()
    if base is None:
        return linear.pieces(models, weight=shares, normalize=False, dtype=dtype)
    thin = [WHOLE] * len(models)
    return merge_task_vectors(
        base, models, thin=thin, weight=shares, elect=False, normalize=False, scale=1.0, dtype=dtype
    )


def gram(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """The dot products of N tensors, each taken as one vector (less the base): [N, N], float64."""
    tensors = models if base is None else [*models, base]
    loops, count = chunks.kernels(), len(models)
    sums, total = np.zeros((count, count, loops.LANES)), np.empty((count, count))
    work = np.empty((len(tensors), loops.BLOCK))
    for _, parts in chunks.spans(tensors):
        loops.products(parts, sums, work, base is not None)
    loops.gram(sums, total)
    return torch.from_numpy(total)


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors' lengths [..., N], and the cosines between them [..., N, N]: 0 where a vector has no length."""
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(length > 0.0, 1.0 / length, 0.0)
    return length, (inverse[..., :, None] * gram * inverse[..., None, :]).clamp_(-1.0, 1.0)


def row_pieces(tensors: Sequence[Tensor], kind: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (which rows, these rows of all tensors [tensors, rows, length]); the memory is used again.

    tensors: matrices of one shape
    kind:    the type of the pieces, which hold as many whole rows as fit, and one at least
    """
    rows, length = tensors[0].shape
    most = max(1, min(rows, min(chunks.CHUNK, PIECE) // max(1, length)))
    buffer = torch.empty(len(tensors), most, length, dtype=kind)
    for begin in range(0, rows, most):
        piece = slice(begin, min(begin + most, rows))
        part = buffer[:, : piece.stop - begin]
        for place, tensor in zip(part, tensors, strict=True):
            place.copy_(tensor[piece])
        yield piece, part


def _combine_rows(base: Tensor | None, models: Sequence[Tensor], factors: Factors, dtype: torch.dtype | None) -> Pieces:
    """Each vector is a row, and in the cache from its products to its combination."""
    tensors = [*models] if base is None else [base, *models]
    flat, length = [tensor.reshape(-1) for tensor in tensors], models[0].shape[-1]

    def fill(begin: int, out: Tensor) -> None:
        end, made = begin + out.numel(), out.view(-1, length)
        for rows, part in row_pieces([each[begin:end].view(-1, length) for each in flat], torch.float64):
            vectors = part.transpose(0, 1)  # [rows, tensors, length]
            start = 0.0
            if base is not None:
                start, vectors = vectors[:, 0], vectors[:, 1:].sub_(vectors[:, :1])
            share = factors(torch.bmm(vectors, vectors.mT))[:, None]
            made[rows] = torch.bmm(share, vectors)[:, 0].add_(start)

    return Pieces(models[0].shape, chunks.result_type(tensors, dtype), fill, unit=max(length, 1))


def _combine_across(
    base: Tensor | None, models: Sequence[Tensor], factors: Factors, axis: int, dtype: torch.dtype | None
) -> Pieces:
    """Vectors lie across rows, one below each number of a row: a walk for their products, and one to combine them."""
    tensors = [*models] if base is None else [*models, base]
    shape, count = models[0].shape, len(models)
    blocks, length, width = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    rows = [tensor.reshape(-1, width) if width else tensor.reshape(0, 1) for tensor in tensors]
    total = torch.zeros(blocks, count, count, width, dtype=torch.float64)
    for block in range(blocks):
        for _, part in row_pieces([each[block * length : (block + 1) * length] for each in rows], torch.float64):
            vectors = part[:count].sub_(part[count]) if base is not None else part
            for i, j in product(range(count), repeat=2):
                total[block, i, j] += (vectors[i] * vectors[j]).sum(0)
    share = factors(total.permute(0, 3, 1, 2).reshape(-1, count, count)).view(blocks, width, count)

    def fill(begin: int, out: Tensor) -> None:
        first, made = begin // width, out.view(-1, width)
        for some, part in row_pieces([each[first : first + len(made)] for each in rows], torch.float64):
            vectors = part[:count].sub_(part[count]) if base is not None else part
            of_block = share[torch.arange(first + some.start, first + some.stop) // length]  # [rows, width, models]
            moved = (vectors.permute(1, 2, 0) * of_block).sum(-1)
            made[some] = moved.add_(part[count]) if base is not None else moved

    return Pieces(shape, chunks.result_type(tensors, dtype), fill, unit=max(width, 1))
