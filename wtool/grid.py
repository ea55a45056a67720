"""The quantization grid: a matrix as integer codes, with a scale (and a zero) for each group of a row.

    weight[r, i] ≈ (codes[r, i] - zeros[r, g]) * scales[r, g],    g = group of input feature i

Codes are signed, -2^(b-1) to 2^(b-1) - 1, whatever a file format makes of them. A symmetric grid has no zeros; its
scale may be negative: the weight of largest magnitude, of either sign, lands exactly on -2^(b-1), so that no half of
the range lies idle (an unsigned scale wastes the code -2^(b-1) or clips the largest weight by half a step). An
asymmetric grid always contains 0, so that a group of weights of one sign is not clipped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)
_ROWS = 1 << 20  # weights, of whole rows, at a time
_CHUNK = 1 << 17  # weights at a time, so that what is computed from them stays in the processor's cache


@dataclass(frozen=True)
class Grid:
    """What codes there are, and how many input features share a scale."""

    bits: int  # of a code, 2 to 8
    group_size: int  # input features; -1 is the whole row
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def highest(self) -> int:
        return (1 << self.bits - 1) - 1

    def width(self, in_features: int) -> int:
        """Input features of a group; the last group of a row may have fewer."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Groups in a row."""
        return ceil(in_features / self.width(in_features))

    def group_index(self, in_features: int, device: torch.device | str = "cpu") -> Tensor:
        """The group of every input feature, int64 [in], where neighbours share one."""
        return torch.arange(in_features, device=device) // self.width(in_features)


@dataclass(frozen=True)
class Quantized:
    """A matrix on a grid."""

    codes: Tensor  # int8 [out, in]
    scales: Tensor  # [out, groups], in the type that is stored
    zeros: Tensor | None  # int8 [out, groups]; None where the grid is symmetric
    group_index: Tensor  # int64 [in]

    def rows(self, rows: slice) -> "Quantized":
        """Some rows of it."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Quantized(self.codes[rows], self.scales[rows], zeros, self.group_index)

    def values(self) -> Tensor:
        """The matrix it stands for, float32 [out, in]."""
        codes = self.codes.float()
        if self.zeros is not None:
            codes -= self.zeros.float().index_select(1, self.group_index)
        return codes.mul_(self.scales.float().index_select(1, self.group_index))


@dataclass(frozen=True)
class Clip:
    """A search for the share of each group's range to cover: outliers may be cut off for a finer step.

    The error is the sum over the group of |weight - rounded weight| ** norm. Shares from the whole range to the lowest
    are tried, of both signs where the grid is symmetric, then six between the best one and its neighbours.
    """

    lowest: float = 0.4  # share of the range, in (0, 1)
    steps: int = 8  # shares to try at first, in even ratios
    norm: float = 2.5  # 2 and 2.5 are the fast ones


def fit(weight: Tensor, grid: Grid, *, dtype: torch.dtype, clip: Clip | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros for a matrix, from its weights alone.

    weight: [out, in]
    dtype: the type that scales are stored in; they are rounded to it here, before anything is computed with them
    clip: None covers the whole range

    returns: scales [out, groups] in `dtype`, nonzero and finite; zeros int8 [out, groups], None where symmetric
    """
    rows, columns = weight.shape
    width = grid.width(columns)
    ends = [columns] if columns % width == 0 else [columns // width * width, columns]
    parts: list[tuple[Tensor, Tensor | None]] = []
    begin = 0
    for end in ends:  # whole groups, then the short one at the end
        if end > begin:
            grouped = weight[:, begin:end].reshape(rows, -1, min(width, end - begin))
            parts.append(_fit_groups(grouped, grid, dtype, clip))
            begin = end
    scales = torch.cat([part for part, _ in parts], dim=1)
    zeros = [part for _, part in parts if part is not None]
    return scales, torch.cat(zeros, dim=1) if zeros else None


def _fit_groups(weight: Tensor, grid: Grid, dtype: torch.dtype, clip: Clip | None) -> tuple[Tensor, Tensor | None]:
    """The same for weights [out, groups, width]."""
    rows, groups, width = weight.shape
    flat = weight.reshape(-1, width)
    step = max(1, _CHUNK // width) if weight.device.type == "cpu" else len(flat)
    one = _symmetric if grid.symmetric else _asymmetric
    found = [one(chunk.float(), grid, dtype, clip) for chunk in flat.split(step)]
    scales = torch.cat([scale for scale, _ in found]).reshape(rows, groups)
    zeros = [zero for _, zero in found if zero is not None]
    return scales, torch.cat(zeros).reshape(rows, groups).to(torch.int8) if zeros else None


def _symmetric(weight: Tensor, grid: Grid, dtype: torch.dtype, clip: Clip | None) -> tuple[Tensor, Tensor | None]:
    """Signed scales of groups [n, width]."""
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    full = torch.where(high > -low, high, low) / grid.lowest  # of the sign that puts the largest weight on the lowest

    def at(share: Tensor) -> tuple[Tensor, Tensor | None]:
        return _stored(full * share, dtype), None

    return _searched(weight, at, grid, clip) if clip else at(torch.ones_like(full))


def _asymmetric(weight: Tensor, grid: Grid, dtype: torch.dtype, clip: Clip | None) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of groups [n, width]."""
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)

    def at(share: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = _stored((high - low) * share / (grid.highest - grid.lowest), dtype)
        return scale, (grid.lowest - low * share / scale.float()).round().clamp(grid.lowest, grid.highest)

    return _searched(weight, at, grid, clip) if clip else at(torch.ones_like(low))


def _searched(
    weight: Tensor, at: Callable[[Tensor], tuple[Tensor, Tensor | None]], grid: Grid, clip: Clip
) -> tuple[Tensor, Tensor | None]:
    """The scales and zeros of groups [n, width] at the share [n] of their range where the error is least."""
    spare = torch.empty_like(weight), torch.empty_like(weight)
    share = torch.ones_like(weight[:1, 0])
    for factors in _factors(clip, grid):
        tried = torch.tensor(factors, device=weight.device)[:, None] * share
        scales, zeros = at(tried)  # [factors, n]
        inverse = 1 / scales.float()
        offsets = [None] * len(factors) if zeros is None else zeros.unbind()
        pairs = zip(inverse.unbind(), offsets, strict=True)
        errors = [_error(weight, one, zero, grid, clip.norm, spare) for one, zero in pairs]
        best = (torch.stack(errors) / inverse.abs().pow_(clip.norm)).argmin(dim=0, keepdim=True)
        share = tried.expand(-1, len(weight)).gather(0, best)[0]
    return at(share)


def _factors(clip: Clip, grid: Grid) -> tuple[list[float], list[float]]:
    """What to multiply the whole range with, then the best share found: that, and six times a quarter of a step."""
    ratio = clip.lowest ** (1 / max(clip.steps - 1, 1))
    signs = (1, -1) if grid.symmetric else (1,)
    coarse = [sign * ratio**i for i in range(clip.steps) for sign in signs]
    return coarse, [ratio ** (i / 4) for i in range(-3, 4)]


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it is stored: finite, and nonzero, so that one can divide by it; 1 for a group of zeros."""
    limits = torch.finfo(dtype)
    magnitude = scale.abs().clamp(limits.tiny, limits.max)
    return torch.where(scale == 0, 1.0, torch.copysign(magnitude, scale)).to(dtype)


def _error(
    weight: Tensor, inverse: Tensor, zero: Tensor | None, grid: Grid, norm: float, spare: tuple[Tensor, Tensor]
) -> Tensor:
    """The sum over each group [n, width] of |weight - rounded| ** norm, in steps of the grid; `inverse` is of scales.

    spare: memory of the weight's shape, twice
    """
    exact, off = spare
    torch.mul(weight, inverse[:, None], out=exact)
    if zero is not None:
        exact += zero[:, None]
    torch.round(exact, out=off).clamp_(grid.lowest, grid.highest).sub_(exact)
    if norm == 2:
        off.square_()
    elif norm == 2.5:  # a root is several times as fast as a power
        torch.sqrt(off.abs_(), out=exact)
        off.square_().mul_(exact)
    else:
        off.abs_().pow_(norm)
    return off.sum(dim=1)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, group_index: Tensor, grid: Grid) -> Tensor:
    """The nearest code of every weight, int8 [out, in]; halves go to the even code."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in some_rows(weight):
        exact = weight[rows].float() / scales[rows].float().index_select(1, group_index)
        if zeros is not None:
            exact += zeros[rows].float().index_select(1, group_index)
        codes[rows] = exact.round_().clamp_(grid.lowest, grid.highest).to(torch.int8)
    return codes


def some_rows(matrix: Tensor) -> Iterator[slice]:
    """All rows of a matrix, some at a time, so that what is computed from them takes little memory beside it."""
    many = _ROWS if matrix.device.type == "cpu" else matrix.numel()
    step = max(1, many // max(1, matrix.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, len(matrix), step))
