"""AWQ: input features are scaled up before rounding where activations are large, and the scale is undone before them.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", 2023, https://arxiv.org/abs/2306.00978. With scales s, one for each input feature,

    W x ≈ Q(W diag(s)) diag(s)⁻¹ x,    s = a^r,  a the mean of |x|,  r in [0, 1)    (equations 4 and 5)

and with duo scaling, as the authors' code has it, s = a^r / w^(1-r), w the mean over the rows of |W|, each weight as a
share of the largest in its group. Here r is searched for, with and without duo scaling; r = 0 without it leaves all as
it is. Then, after the scaling, the share of each group's range that is covered (section 4.1, "weight clipping"). What
the paper does not have: the grid's scales are then moved to their best for the codes (`refine.refit_scales`).

The paper compares outputs of the module around (attention, or the MLP) in a forward for each candidate. Here it is the
outputs of the matrices themselves, and their squared error needs no forward: with G the Gram matrix of the inputs it is
tr(E G Eᵀ), E = W - Q(W diag(s)) diag(s)⁻¹. For matrices that end their module (o_proj, down_proj) the two are one;
where several share an input, the squared errors are added, each as a share of the squares of its matrix's output, so
that none counts more because its outputs are large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wtool.grid import Grid, Quantized, encode, fit

STEP = 0.1  # between exponents tried at first, in [0, 1); then half a step to either side of the best
MOST_ROWS = 256  # of a matrix that errors are computed of in the search, evenly spread
SMALLEST = 1e-4  # of a mean, and of a scale before scales are brought around 1
SHARES = tuple(1 - i / 20 for i in range(10))  # of a group's range
_ROWS = 1 << 18  # weights at a time in the search for shares


@dataclass(frozen=True)
class Fed:
    """A matrix whose input is to be scaled."""

    weight: Tensor  # float32 [out, in]
    gram: Tensor  # float32 [in, in], the mean of x xᵀ
    size: Tensor  # float32 [in], the mean of |x|
    tokens: int
    grid: Grid
    scale_dtype: torch.dtype
    channel: Tensor | None = None  # int64 [in], the scale that each feature has; None where each has its own

    @cached_property
    def channels(self) -> Tensor:
        return torch.arange(len(self.size), device=self.size.device) if self.channel is None else self.channel

    @cached_property
    def sample(self) -> Tensor:
        """Some rows of the weight, which tell of all."""
        return self.weight[:: -(-len(self.weight) // MOST_ROWS)]

    @cached_property
    def energy(self) -> float:
        """The mean square of these rows' outputs."""
        return float((self.sample @ self.gram).mul_(self.sample).sum(dtype=torch.float64))

    def error(self, scales: Tensor) -> float:
        """The squared error of the output as a share of its square, with scales [channels]."""
        own = scales[self.channels]
        scaled = self.sample * own
        steps, zeros = fit(scaled, self.grid, dtype=self.scale_dtype)
        off = _off(_grouped(scaled, self.grid), steps, zeros, self.grid).flatten(1)[:, : len(own)].div(own)
        error = float((off @ self.gram).mul_(off).sum(dtype=torch.float64))
        return error / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Found:
    """What a search found."""

    scales: Tensor  # float32 [channels]
    exponent: float
    duo: bool
    error: float  # of the squared outputs, summed over the matrices as shares; NaN where there was nothing to go by
    before: float  # the same without scales

    @property
    def is_identity(self) -> bool:
        return self.exponent == 0 and not self.duo


def search_scales(matrices: Sequence[Fed], channels: int) -> Found:
    """The scales with the least error: of all exponents with and without duo scaling, and of none.

    matrices: those that one scaled output goes into
    """
    size, share = mean_size(matrices, channels), mean_share(matrices, channels)
    ones = torch.ones_like(size)
    before = sum(matrix.error(ones) for matrix in matrices)
    best = Found(ones, 0.0, False, before, before)
    if not before > 0:
        return best

    def better(best: Found, exponent: float, duo: bool) -> Found:
        scales = scales_at(size, share, exponent, duo=duo)
        error = sum(matrix.error(scales) for matrix in matrices)
        return Found(scales, exponent, duo, error, before) if error < best.error else best

    for duo in (False, True):
        for number in range(0 if duo else 1, round(1 / STEP)):
            best = better(best, round(number * STEP, 2), duo)
    middle = best
    for exponent in (middle.exponent - STEP / 2, middle.exponent + STEP / 2):
        best = better(best, round(exponent, 2), middle.duo) if exponent > 0 else best
    return best


def mean_size(matrices: Sequence[Fed], channels: int) -> Tensor:
    """The mean of |x| of each channel, over the tokens of all matrices and the features that are of the channel."""
    total = torch.zeros(channels, device=matrices[0].size.device)
    count = torch.zeros_like(total)
    for matrix in matrices:
        total.index_add_(0, matrix.channels, matrix.size * matrix.tokens)
        count.index_add_(0, matrix.channels, torch.full_like(matrix.size, matrix.tokens))
    return total / count.clamp(min=1)


def mean_share(matrices: Sequence[Fed], channels: int) -> Tensor:
    """The mean over rows of |weight| as a share of the largest in its group, of each channel."""
    total = torch.zeros(channels, device=matrices[0].size.device)
    count = torch.zeros_like(total)
    for matrix in matrices:
        grouped = _grouped(matrix.weight.abs(), matrix.grid)
        shares = grouped / grouped.amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        sums = shares.sum(dim=0).flatten()[: len(matrix.size)]
        total.index_add_(0, matrix.channels, sums)
        count.index_add_(0, matrix.channels, torch.full_like(sums, len(matrix.weight)))
    return total / count.clamp(min=1)


def scales_at(size: Tensor, share: Tensor, exponent: float, *, duo: bool) -> Tensor:
    """The scales of one exponent, with the smallest and the largest as far below 1 as above.

    size:     [channels], mean of |x|
    share:    [channels], mean of |weight| as a share of the largest in its group
    exponent: r, in [0, 1)
    """
    scales = size.clamp(min=SMALLEST) ** exponent
    if duo:
        scales = scales / (share ** (1 - exponent) + SMALLEST)
    scales = scales.clamp(min=SMALLEST)
    return scales / (scales.max() * scales.min()).sqrt()


def clipped(weight: Tensor, gram: Tensor, grid: Grid, *, scale_dtype: torch.dtype) -> Quantized:
    """Round a matrix, of every group the share of its range covered that has the least squared error of the output.

    The error is that of the group alone, as if the other groups were exact.

    weight: [out, in], of any float type
    gram:   float32 [in, in], mean of x xᵀ
    """
    width, columns = grid.width(weight.shape[1]), weight.shape[1]
    blocks = _blocks(gram, width)
    chunk = max(1, _ROWS // columns)
    parts = [_clipped_rows(rows.float(), blocks, grid, scale_dtype) for rows in weight.split(chunk)]
    scales = torch.cat([part for part, _ in parts])
    zeros = None if grid.symmetric else torch.cat([part for _, part in parts if part is not None])
    group_index = grid.group_index(columns, weight.device)
    return Quantized(encode(weight, scales, zeros, group_index, grid), scales, zeros, group_index)


def _clipped_rows(weight: Tensor, blocks: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros [rows, groups] of some rows."""
    grouped, columns = _grouped(weight, grid), weight.shape[1]
    limit = grouped.abs().amax(dim=2, keepdim=True)
    least, found, found_zeros = None, None, None
    for share in SHARES:
        cut = grouped.clamp(-limit * share, limit * share).flatten(1)[:, :columns]
        scales, zeros = fit(cut, grid, dtype=dtype)
        off = _off(grouped, scales, zeros, grid).transpose(0, 1)
        error = (off @ blocks).mul_(off).sum(dim=2).t()  # [rows, groups]
        if least is None or found is None:
            least, found, found_zeros = error, scales, zeros
            continue
        better = error < least
        least = torch.where(better, error, least)
        found = torch.where(better, scales, found)
        if zeros is not None and found_zeros is not None:
            found_zeros = torch.where(better, zeros, found_zeros)
    assert found is not None
    return found, found_zeros


def _off(grouped: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """Rounded weights minus weights, [rows, groups, width]; 0 where there was padding."""
    steps = scales.float()[:, :, None]
    codes = grouped / steps
    if zeros is None:
        codes.round_().clamp_(grid.lowest, grid.highest)
    else:
        origin = zeros.float()[:, :, None]
        codes.add_(origin).round_().clamp_(grid.lowest, grid.highest).sub_(origin)
    return codes.mul_(steps).sub_(grouped)


def _grouped(matrix: Tensor, grid: Grid) -> Tensor:
    """[rows, groups, width] of [rows, in], with zeros where the last group is short."""
    width = grid.width(matrix.shape[1])
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % width)).unflatten(1, (-1, width))


def _blocks(gram: Tensor, width: int) -> Tensor:
    """The Gram matrices of single groups, [groups, width, width], with zeros where the last group is short."""
    blocks = [gram[begin : begin + width, begin : begin + width] for begin in range(0, len(gram), width)]
    lack = width - len(blocks[-1])
    blocks[-1] = torch.nn.functional.pad(blocks[-1], (0, lack, 0, lack))
    return torch.stack(blocks)
