"""One sweep over the columns of a weight: each is rounded, and the columns after it make up for its error.

Matrices lie transposed here, several of one shape in a stack: [n, in, out], so that a column is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wtool.grid import Grid
from wtool.threads import one_thread

_COLUMNS = 16  # whose effect on one another is computed one by one
_COLUMNS_GPU = 128  # the same of the kernel


@dataclass(frozen=True)
class Scales:
    """The scales and zeros of a stack, and whose they are."""

    scales: Tensor  # float32 [n, groups, out]
    zeros: Tensor | None  # the same; None where the grid is symmetric
    group_index: Tensor  # int64 [n, in]

    def of(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros of columns, float32 [n, columns, out]."""
        n, groups, out = self.scales.shape
        first = torch.arange(n, device=self.scales.device)[:, None] * groups
        index = (self.group_index[:, begin:end] + first).reshape(-1)
        scales = self.scales.reshape(-1, out).index_select(0, index).reshape(n, -1, out)
        if self.zeros is None:
            return scales, None
        return scales, self.zeros.reshape(-1, out).index_select(0, index).reshape(n, -1, out)


def sweep(
    values: Tensor,
    base: Tensor,
    coupling: Tensor,
    scales: Scales,
    grid: Grid,
    *,
    before_group: Callable[[int, slice], None] | None = None,
) -> None:
    """Round columns in place, from the first to the last.

    values:       float32 [n, in, out], what to round; becomes the codes
    base:         float32 [n, in, out]; becomes base minus the rounded values
    coupling:     float32 [n, in, in]; base minus rounded value of column i, times coupling[i, j], is added to the
                  value of each column j > i; what is not above the diagonal is not used
    before_group: called with index and columns of each group of neighbours once all columns before it are rounded
                  and their effect on its values is added; it may set the group's scales and zeros
    """
    columns = values.shape[1]
    width = grid.width(columns) if before_group else columns
    kernel = _kernel() if values.is_cuda else None
    few = min(_COLUMNS_GPU if kernel else _COLUMNS, width)
    _Sweep(values, base, coupling, scales, grid, before_group, kernel, width, few).over(0, columns)


@dataclass(frozen=True)
class _Sweep:
    """What `over` needs at every depth. (A closure that calls itself would hold the matrices until the next
    collection of cycles, and those of all sweeps before it.)"""

    values: Tensor
    base: Tensor
    coupling: Tensor
    scales: Scales
    grid: Grid
    before_group: Callable[[int, slice], None] | None
    kernel: Callable[..., None] | None
    width: int  # of a group, where groups are told of
    few: int  # columns that go one by one

    def over(self, begin: int, end: int) -> None:
        """Round a range of columns: one half, its effect on the other, the other half."""
        values, base, coupling = self.values, self.base, self.coupling
        if self.before_group and begin % self.width == 0 and end == min(begin + self.width, values.shape[1]):
            self.before_group(begin // self.width, slice(begin, end))
        if end - begin <= self.few:
            part = slice(begin, end)
            own = values[:, part], base[:, part], coupling[:, part, part]
            round_columns(*own, *self.scales.of(begin, end), self.grid, self.kernel)
            return
        unit = self.width if end - begin > self.width else self.few
        middle = begin + -(-(end - begin) // unit) // 2 * unit
        self.over(begin, middle)
        values[:, middle:end].baddbmm_(coupling[:, begin:middle, middle:end].mT, base[:, begin:middle])
        self.over(middle, end)


def _kernel() -> Callable[..., None] | None:
    """The loop for the GPU; None where triton is not installed, and the columns go one by one there too."""
    try:
        from .kernels.gptq_block import round_block
    except ImportError:
        return None
    return round_block


def round_columns(
    values: Tensor,
    base: Tensor,
    coupling: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: Grid,
    kernel: Callable[..., None] | None = None,
) -> None:
    """The sweep over a few columns, with scales and zeros of each, float32 [n, columns, out]."""
    if zeros is not None:
        base.addcmul_(zeros, scales)
    if kernel:
        kernel(values, base, coupling, scales, zeros, grid.lowest, grid.highest)
        return
    with one_thread():
        for i in range(len(values)):
            _round_columns(values[i], base[i], coupling[i], scales[i], None if zeros is None else zeros[i], grid)


def _round_columns(
    values: Tensor, base: Tensor, coupling: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid
) -> None:
    # as few operations a column as can be: on columns that fit the cache, calling them takes longer than what they do
    lowest, highest = float(grid.lowest), float(grid.highest)
    errors, factors = base.t(), coupling.triu(1).t().contiguous()  # 0 for itself and what comes after it
    columns = zip(values.unbind(), base.unbind(), scales.unbind(), factors.unbind(), strict=True)
    for i, (value, rest, scale, factor) in enumerate(columns):
        value.addmv_(errors, factor)
        if zeros is None:
            value.div_(scale)
        else:
            torch.addcdiv(zeros[i], value, scale, out=value)
        value.round_().clamp_(lowest, highest)
        rest.addcmul_(value, scale, value=-1)
