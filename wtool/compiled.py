"""Compiling loops by numba, and what it lacks.

numba tells by a function's own file whether what it kept of it still holds: loops that call one another are in one
file, and a change in this one asks for a change in those that use it.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile when it is first called, to run without the interpreter's lock; keep that on the disk where there is a
    place to keep it."""
    try:
        kept: Callable[..., Any] = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither beside the function's file nor in the user's cache
        kept = njit(nogil=True, error_model="numpy")(function)
    return kept


def _reinterpreted(_: Any, number: Any) -> Any:
    """An integer's bits as a float, or the other way: int64 and float64, else uint32 and float32."""
    if number in (types.int64, types.float64):
        given, kind = number, types.float64 if number == types.int64 else types.int64
    else:
        is_integer = isinstance(number, types.Integer)
        given, kind = (types.uint32, types.float32) if is_integer else (types.float32, types.uint32)

    def build(context: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.bitcast(values[0], context.get_value_type(kind))

    return kind(given), build


def _fused(_: Any, one: Any, other: Any, added: Any) -> Any:
    """one * other + added, rounded once: an instruction of nearly all processors, and the same numbers without it."""

    def build(__: Any, builder: Any, ___: Any, values: Any) -> Any:
        return builder.fma(*values)

    return one(one, one, one), build


def _upper_product(_: Any, one: Any, other: Any) -> Any:
    """The upper 64 of the 128 bits of the product of two integers of 64 bits without a sign."""

    def build(context: Any, builder: Any, __: Any, values: Any) -> Any:
        wide = [builder.zext(value, ir.IntType(128)) for value in values]
        return builder.trunc(builder.lshr(builder.mul(*wide), ir.Constant(ir.IntType(128), 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), build


bits: Any = intrinsic(_reinterpreted)
fma: Any = intrinsic(_fused)
upper_product: Any = intrinsic(_upper_product)
