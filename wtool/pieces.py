"""Tensors that are made a piece at a time, when they are written.

The result of a step may be `Pieces`, which is made, looked at, summed and put into the buffer of the disk's next write
piece by piece: so the largest tensor is never whole in memory, and what is near in time is near in the caches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import update_wrapper
from typing import Generic, ParamSpec

import torch
from torch import Tensor

PIECE = 1 << 21  # elements; with fewer, threads wait longer for one another than the second cache saves

Asked = ParamSpec("Asked")


@dataclass(frozen=True)
class Pieces:
    """A tensor to be made.

    fill: (first element, memory to fill) makes a piece; the memory has one axis, and is of any float type: of a wider
        one than `dtype` it gets what has not been rounded yet
    unit: pieces begin at multiples of so many elements, and end there or with the tensor
    """

    shape: torch.Size
    dtype: torch.dtype
    fill: Callable[[int, Tensor], None]
    unit: int = 1

    @property
    def count(self) -> int:
        return self.shape.numel()

    def ranges(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Elements in order, first and end of each piece; begin, end: at multiples of the unit."""
        end = self.count if end is None else end
        step = max(PIECE // self.unit, 1) * self.unit
        for first in range(begin, end, step):
            yield first, min(first + step, end)

    def some(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Some elements, in another type."""
        first, last = begin // self.unit * self.unit, min(-(-end // self.unit) * self.unit, self.count)
        made = torch.empty(last - first, dtype=dtype)
        for start, stop in self.ranges(first, last):
            self.fill(start, made[start - first : stop - first])
        return made[begin - first : end - first]

    def whole(self) -> Tensor:
        return self.some(0, self.count, self.dtype).view(self.shape)


def pieces_of(tensor: Tensor, dtype: torch.dtype | None = None) -> Pieces:
    """A tensor that is there, in its type or another."""
    flat = tensor.detach().reshape(-1)

    def fill(begin: int, out: Tensor) -> None:
        out.copy_(flat[begin : begin + out.numel()])

    return Pieces(tensor.shape, dtype or tensor.dtype, fill)


def whole(made: "Tensor | Pieces") -> Tensor:
    """A tensor that is there, or is made now."""
    return made.whole() if isinstance(made, Pieces) else made


class InPieces(Generic[Asked]):
    """A function whose result is made whole where it is called, and in pieces where `pieces` is."""

    def __init__(self, function: Callable[Asked, Pieces]):
        self.pieces = function
        update_wrapper(self, function)

    def __call__(self, *arguments: Asked.args, **named: Asked.kwargs) -> Tensor:
        return self.pieces(*arguments, **named).whole()

    def __reduce__(self) -> str:
        return self.pieces.__qualname__  # pickled as a function is: by its name
