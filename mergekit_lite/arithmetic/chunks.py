"""The walk through tensors in pieces, as arrays for the compiled loops (`kernels`).

Merging is bound by memory traffic: a whole-tensor expression writes and reads every intermediate result through
main memory, and a float32 copy of a bfloat16 embedding is twice the embedding. The loops keep what is between inputs
and output in the processor's cache, and read bfloat16, float32 and float64 from where they lie. Other types, and
tensors of several types, are converted a piece at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wtool.memory import without_collection
from wtool.pieces import Pieces

CHUNK = 1 << 19  # elements
_PLAIN = (torch.bfloat16, torch.float32, torch.float64)  # what the loops read and write

Array = NDArray[Any]
Kernel = Callable[[int, tuple[Array, ...], Array], None]
"""(first element, the inputs' pieces, the result's piece to fill)."""


@cache
def kernels() -> Any:
    """The compiled loops: what compiles them takes a third of a second to import, which simple methods do without."""
    with without_collection():
        from . import kernels

        kernels.spread((np.zeros(1),) * 2, np.zeros(1), np.zeros((4, 1)))  # the first call imports much too
    return kernels


def working_type(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 if an input is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def result_type(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """The type asked for, else the smallest that holds every input's values."""
    if dtype is not None:
        return dtype
    found = tensors[0].dtype
    for tensor in tensors:
        found = torch.promote_types(found, tensor.dtype)
    return found


def of_working_type(tensors: Sequence[Tensor], values: Any) -> Array:
    """Numbers in the type of the arithmetic."""
    return np.asarray(values, dtype=_numpy_type(tensors))


def empty(tensors: Sequence[Tensor], *shape: int) -> Array:
    """Memory for numbers in the type of the arithmetic."""
    return np.empty(shape, dtype=_numpy_type(tensors))


def work(tensors: Sequence[Tensor], rows: int) -> Array:
    """Room for the loops, in the type of the arithmetic [rows, BLOCK]."""
    return empty(tensors, rows, kernels().BLOCK)


def _numpy_type(tensors: Sequence[Tensor]) -> type[np.floating]:
    return np.float64 if working_type(tensors) == torch.float64 else np.float32


def pieces(tensors: Sequence[Tensor], unit: int = 1) -> Iterator[tuple[int, tuple[Array, ...]]]:
    """Yield (first element, the tensors' pieces), to be read only.

    unit: pieces begin at multiples of so many elements, and end there or with the tensors
    """
    read, step = _reader(tensors), max(CHUNK // unit, 1) * unit
    for begin in range(0, tensors[0].numel(), step):
        yield begin, read(begin, begin + step)


def spans(tensors: Sequence[Tensor], unit: int = 1) -> Iterator[tuple[int, tuple[Array, ...]]]:
    """The same, in as few pieces as can be: in one, where the loops read the tensors as they lie."""
    if _is_plain(tensors):
        yield 0, _reader(tensors)(0, tensors[0].numel())
    else:
        yield from pieces(tensors, unit)


def apply(kernel: Kernel, tensors: Sequence[Tensor], *, dtype: torch.dtype | None = None, unit: int = 1) -> Pieces:
    """A tensor that is computed piece by piece.

    tensors: of one shape, any float types
    dtype:   of the result; the inputs' (promoted) if None
    unit:    of the pieces
    """
    read, kind = _reader(tensors), working_type(tensors)

    def fill(begin: int, out: Tensor) -> None:
        parts = read(begin, begin + out.numel())
        if (direct := _view(out)) is not None:
            kernel(begin, parts, direct)
        else:
            buffer = torch.empty(out.numel(), dtype=kind)
            kernel(begin, parts, buffer.numpy())
            out.copy_(buffer)

    return Pieces(tensors[0].shape, result_type(tensors, dtype), fill, unit)


def _reader(tensors: Sequence[Tensor]) -> Callable[[int, int], tuple[Array, ...]]:
    """From two elements to the pieces between them, as the loops read them."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    views = [view for tensor in flat if (view := _view(tensor)) is not None]
    if _is_plain(tensors):
        return lambda begin, end: tuple(view[begin:end] for view in views)
    kind = working_type(tensors)
    return lambda begin, end: tuple(part[begin:end].to(kind).numpy() for part in flat)


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the loops read tensors as they lie."""
    return len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype in _PLAIN


def _view(flat: Tensor) -> Array | None:
    """A tensor's memory as the loops read and write it; None if they do not."""
    if flat.dtype == torch.bfloat16:
        return flat.detach().view(torch.uint16).numpy()
    return flat.detach().numpy() if flat.dtype in _PLAIN else None
