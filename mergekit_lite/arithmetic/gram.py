"""Merging by lengths and angles: one linear combination of the models' vectors, found from their Gram matrix.

Every length of, and angle between, linear combinations of N vectors follows from the N x N matrix of their dot
products. So a method on the sphere takes two walks through the tensors, one for the Gram matrix (in float64: the
angle between two tunings of one model is small, and its cosine near 1) and one for the combination; what lies between
is arithmetic on N x N numbers, however many steps it has.

A vector is a tensor, or each row or column of it. By vectors, one walk does both, as a vector is in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from wtool.pieces import Pieces, pieces_of

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
        return _combine_vectors(base, models, factors, axis, dtype)
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
    total = np.zeros((len(models), len(models)))
    work = np.empty((len(tensors) + 1, chunks.kernels().BLOCK))
    for _, parts in chunks.pieces(tensors):
        chunks.kernels().gram(parts, total, work, base is not None)
    return torch.from_numpy(total)


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors' lengths [..., N], and the cosines between them [..., N, N]: 0 where a vector has no length."""
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(length > 0.0, 1.0 / length, 0.0)
    return length, (inverse[..., :, None] * gram * inverse[..., None, :]).clamp_(-1.0, 1.0)


def row_pieces(tensors: Sequence[Tensor], kind: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (which rows, these rows of all tensors [tensors, rows, length]); the memory is used again.

    tensors: matrices of one shape, in any strides
    kind:    the type of the pieces, which hold as many whole rows as fit, and one at least
    """
    rows, length = tensors[0].shape
    most = max(1, min(rows, min(chunks.CHUNK, PIECE) // max(1, length)))
    buffer = torch.empty(len(tensors), most, length, dtype=kind)
    for begin in range(0, rows, most):
        piece = slice(begin, min(begin + most, rows))
        part = buffer[:, : piece.stop - begin]
        for place, tensor in zip(part, tensors, strict=True):
            _copy_rows(place, tensor[piece])
        yield piece, part


def _copy_rows(to: Tensor, rows: Tensor) -> None:
    """Copy rows of which one of the two may lie across memory: it is walked along memory, and turned in the cache."""
    if rows.stride(1) == 1 and to.stride(1) == 1:
        to.copy_(rows)
    elif rows.stride(1) == 1:
        to.mT.copy_(rows.mT.contiguous())
    else:
        to.copy_(rows.mT.to(to.dtype).contiguous().mT)


def _combine_vectors(
    base: Tensor | None, models: Sequence[Tensor], factors: Factors, axis: int, dtype: torch.dtype | None
) -> Pieces:
    tensors = [*models] if base is None else [base, *models]
    shape, kind = models[0].shape, chunks.result_type(tensors, dtype)
    if axis % len(shape) == len(shape) - 1:
        flat, length = [tensor.reshape(-1) for tensor in tensors], shape[-1]

        def fill(begin: int, out: Tensor) -> None:
            rows = [part[begin : begin + out.numel()].view(-1, length) for part in flat]
            _combine_rows(base is not None, rows, factors, out.view(-1, length))

        return Pieces(shape, kind, fill, unit=max(length, 1))
    whole = torch.empty(shape, dtype=chunks.working_type(tensors))  # vectors lie across all of it
    views = [tensor.transpose(axis, -1) for tensor in (whole, *tensors)]
    for matrix in product(*map(range, views[0].shape[:-2])):
        out, *inputs = (view[matrix] for view in views)
        _combine_rows(base is not None, inputs, factors, out)
    return pieces_of(whole, kind)


def _combine_rows(has_base: bool, tensors: Sequence[Tensor], factors: Factors, out: Tensor) -> None:
    """Combine each row of matrices in any strides; has_base: the first is one."""
    for rows, part in row_pieces(tensors, torch.float64):
        vectors = part.transpose(0, 1)  # [rows, tensors, length]
        start = 0.0
        if has_base:
            start, vectors = vectors[:, 0], vectors[:, 1:].sub_(vectors[:, :1])
        share = factors(torch.bmm(vectors, vectors.mT))[:, None]
        _copy_rows(out[rows], torch.bmm(share, vectors)[:, 0].add_(start))
