"""The sweep of `quant.sweep` over a block of columns in one kernel: rows of the weight in parallel, columns in turn.

A program holds what is to be rounded of some rows for all columns of the block, takes column after column out of it,
rounds it, and adds what its error is to change in the rest.
"""

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS = 16  # of a weight in one program; few, so that there are programs for all processors
_MAGIC = tl.constexpr(1.5 * 2**23)  # float32 has no bits for fractions from here on: adding it rounds, to even


def round_block(
    values: Tensor, base: Tensor, coupling: Tensor, scales: Tensor, zeros: Tensor | None, lowest: int, highest: int
) -> None:
    """Round the columns of a block in place, in order; the arguments are those of `quant.sweep.round_columns`.

    values: float32 [n, columns, out], at most 128 columns or so; the last dimension of all but coupling is contiguous
    base:   with zeros, zeros * scales is added to it already
    """
    n, columns, rows = values.shape
    shifts = scales if zeros is None else zeros
    assert all(t.stride(-1) == 1 for t in (values, base, scales, shifts))
    strides = [*values.stride()[:2], *base.stride()[:2], *coupling.stride(), *scales.stride()[:2], *shifts.stride()[:2]]
    options: dict[str, Any] = {
        "COLUMNS": triton.next_power_of_2(columns),
        "ROWS": ROWS,
        "ZEROS": zeros is not None,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    arguments: list[Any] = [
        values,
        base,
        coupling,
        scales,
        shifts,
        rows,
        columns,
        *strides,
        float(lowest),
        float(highest),
    ]
    _round_block[(n, triton.cdiv(rows, ROWS))](*arguments, **options)


@triton.jit
def _round_block(
    values,
    base,
    coupling,
    scales,
    zeros,
    rows,
    columns,
    values_n,
    values_column,
    base_n,
    base_column,
    coupling_n,
    coupling_from,
    coupling_to,
    scales_n,
    scales_column,
    zeros_n,
    zeros_column,
    lowest,
    highest,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ZEROS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    values += n * values_n + row
    base += n * base_n + row
    scales += n * scales_n + row
    zeros += n * zeros_n + row
    coupling += n * coupling_n + column * coupling_to
    inside = row < rows
    block = tl.load(
        values[None, :] + column[:, None] * values_column, mask=(column < columns)[:, None] & inside[None, :], other=0.0
    )
    for i in range(columns):
        value = tl.sum(tl.where((column == i)[:, None], block, 0.0), axis=0)
        scale = tl.load(scales + i * scales_column, mask=inside, other=1.0)
        code = tl.div_rn(value, scale)
        if ZEROS:
            code += tl.load(zeros + i * zeros_column, mask=inside, other=0.0)
        code = tl.minimum(tl.maximum(code, lowest), highest)
        code = (code + _MAGIC) - _MAGIC
        error = tl.load(base + i * base_column, mask=inside, other=0.0) - code * scale
        tl.store(values + i * values_column, code, mask=inside)
        tl.store(base + i * base_column, error, mask=inside)
        factor = tl.load(coupling + i * coupling_from, mask=(column > i) & (column < columns), other=0.0)
        block += factor[:, None] * error[None, :]
