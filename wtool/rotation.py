"""Turning channels: an orthogonal matrix multiplied into a weight, in float64 and rounded once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wtool.writer import checksum

PIECE = 1 << 18  # elements that are turned at a time, in float64


class Turn(Protocol):
    """x -> x Q for an orthogonal Q, as quickly as Q's form allows."""

    def __call__(self, rows: Tensor) -> Tensor:
        """float64 [n, size] -> float64 [n, size]"""
        ...

    @property
    def digest(self) -> str:
        """Tells this Q from others."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix without a form."""

    matrix: Tensor  # float64 [size, size], a direction in every column

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    @property
    def digest(self) -> str:
        return checksum(self.matrix.contiguous())


def turned(
    weight: Tensor,
    turn: Callable[[Tensor], Tensor],
    *,
    axis: int,
    gain: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A tensor with its channels along one axis turned.

    weight:  any shape; of what reads the residual stream [out, hidden], of what writes to it [hidden, in] or [hidden]
    turn:    float64 [n, size] -> float64 [n, size], where size is that of the axis
    axis:    where the channels are
    gain:    [size], what channels are multiplied by first: the weight of the norm before what reads the stream
    dtype:   of the result; the weight's unless told otherwise
    returns: of the weight's shape; computed in float64 and rounded once
    """
    lies = weight.movedim(axis, -1)
    rows = lies.reshape(-1, lies.shape[-1])
    found = torch.empty(rows.shape, dtype=dtype or weight.dtype)
    count = max(1, PIECE // rows.shape[1])
    for begin in range(0, len(rows), count):
        piece = rows[begin : begin + count].double()
        piece = piece if gain is None else piece * gain.double()
        found[begin : begin + count] = turn(piece)
    return found.reshape(lies.shape).movedim(-1, axis).contiguous()
