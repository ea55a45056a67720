"""SparseGPT: drop weights column by column, those that are left making up for what was dropped before them.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023,
https://arxiv.org/abs/2301.00774 (algorithm 1). With G the Gram matrix of the inputs and U upper triangular,
UᵀU = G⁻¹, it drops where W[i, j]² / U[j, j]² is lowest, and moves what is dropped to the columns after j.

It is computed without the inverse of G. With G = A diag(pivots) Aᵀ, A unit upper triangular, U is A⁻¹ with its rows
divided by the roots of the pivots; so pivots[j] = 1 / U[j, j]², and with E the weights W minus what is left of them

    tr(E G Eᵀ) = Σ_j pivots[j] |E[:, j] + Σ_{i<j} E[:, i] A[i, j]|²

is what all of it does to the outputs. For the errors E of all columns before a block B it is least, as far as B goes,
where B stands at W_B + (Σ_i E[:, i] A[i, B]) A_BB⁻¹; inside the block, what is dropped of column j moves the later ones
by A_BB⁻¹[j, :], as in the paper.

With a grid what stays is rounded as its column comes, and later columns make up for that too (section 3.5 of the
paper). Scales are fitted before to the weights as they were: the largest weights of a group make them, which pruning
keeps, and so they are of groups of neighbours, as the formats want them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wtool.grid import Clip, Grid, Quantized, encode, fit
from wtool.statistics import Factor, factor

from .pattern import Sparsity, count
from .selection import keep_by_row, keep_highest, keep_of_first
from .wanda import input_norm, wanda_scores

_BLOCK = 128  # columns that one threshold is for, as in the paper
_COLUMNS = 8  # whose effect on one another is computed one by one

Light = Any  # a tensor, or numpy's view of it: only operators and methods that both have are used on one
Rounding = Callable[[Light, int], Light]  # a column [out] and its number -> the nearest that can be stored


@dataclass(frozen=True)
class Outcome:
    """A pruned weight, and what was done to get it."""

    weight: Tensor  # [out, in], of the type it had; 0 where it was dropped
    keep: Tensor  # bool [out, in], True where the weight stayed
    quantized: Quantized | None  # the same on the grid, where there is one
    damping: float | None  # share of the diagonal's mean that was added to it; None where Wanda took over
    fallback: str | None  # why Wanda took over
    dead: int  # input features that were 0 at every token; their weights are 0, unless Wanda took over
    loss: float | None  # mean squared error of the outputs, by the damped Gram matrix; None where Wanda took over


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: Sparsity,
    *,
    damping: float = 0.01,
    mask: Tensor | None = None,
    grid: Grid | None = None,
    scale_dtype: torch.dtype = torch.float32,
    clip: Clip | None = None,
) -> Outcome:
    """Prune a matrix; a share is exact over the whole of it, with a threshold for every 128 columns.

    weight:      [out, in], of any float type
    gram:        float32 [in, in], mean of x xᵀ over calibration tokens, on the device of the weight
    damping:     share of the mean of the Gram matrix's diagonal to add to the diagonal; more is tried if need be
    mask:        bool [out, in], False where weights are dropped already and must stay so; these count
    grid:        to round what stays to; scale_dtype and clip as in wtool.grid.fit

    raises: RuntimeProblem where a value of the Gram matrix is not finite
    """
    found = factor(gram, damping=damping)
    dead = int((gram.diagonal() == 0).sum())
    if found is None or dead == len(gram):
        reason = "its inputs were all 0" if found else "its Gram matrix is not positive definite, however damped"
        keep = _by_wanda(weight, gram, sparsity, mask)
        pruned = weight.masked_fill(~keep, 0).float()
        quantized = _encoded(pruned, _fitted(weight.float(), grid, scale_dtype, clip), grid)
        return Outcome(_result(pruned, quantized, weight), keep, quantized, None, reason, dead, None)
    living = weight.float().masked_fill(found.dead, 0) if dead else weight.float()
    scales = _fitted(living, grid, scale_dtype, clip)
    swept = _swept(living, found, sparsity, mask, _rounding(scales, grid))
    pruned, keep = swept.left.t().contiguous(), swept.keep.t().contiguous()
    quantized = _encoded(pruned, scales, grid)
    return Outcome(_result(pruned, quantized, weight), keep, quantized, found.damping, None, dead, swept.loss)


def _by_wanda(weight: Tensor, gram: Tensor, sparsity: Sparsity, mask: Tensor | None) -> Tensor:
    scores = wanda_scores(weight, input_norm(gram))
    if mask is None:
        return keep_by_row(scores, sparsity)
    return keep_by_row(scores.masked_fill_(~mask, -1), sparsity) & mask


def _result(pruned: Tensor, quantized: Quantized | None, weight: Tensor) -> Tensor:
    return (pruned if quantized is None else quantized.values()).to(weight.dtype)


# The sweep; matrices lie transposed, [in, out], so that a column is contiguous


@dataclass(frozen=True)
class _Swept:
    left: Tensor  # float32 [in, out], 0 where it was dropped
    keep: Tensor  # bool [in, out]
    loss: float


def _swept(weight: Tensor, found: Factor, sparsity: Sparsity, mask: Tensor | None, rounding: Rounding | None) -> _Swept:
    errors = weight.t().clone(memory_format=torch.contiguous_format)  # those of columns to come are their weights
    left, keep, loss = torch.empty_like(errors), torch.empty_like(errors, dtype=torch.bool), 0.0
    width = max(_BLOCK // sparsity.pattern[1], 1) * sparsity.pattern[1] if sparsity.pattern else _BLOCK
    for begin in range(0, len(errors), width):
        part = slice(begin, min(begin + width, len(errors)))
        effects = _inverse(found.upper[part, part]).t().contiguous()
        values = torch.addmm(errors[part], effects, found.upper[:begin, part].t() @ errors[:begin])
        choice = _Choice(sparsity, found.pivots[part], None if mask is None else mask[:, part].t(), part)
        lost = _pruned(values, effects, choice, keep[part], rounding)
        left[part] = values.sub_(lost)
        errors[part] -= left[part]
        loss += float((lost.square_().sum(dim=1).double() * found.pivots[part]).sum())
    return _Swept(left, keep, loss)


@dataclass(frozen=True)
class _Choice:
    """What decides which weights of a block stay."""

    sparsity: Sparsity
    pivots: Tensor  # [columns]
    allowed: Tensor | None  # bool [columns, out]
    part: slice  # of the matrix's columns

    def keep(self, values: Tensor, first: int = 0) -> Tensor:
        """Which weights of some of the block's columns stay, from the number `first` on; bool [columns, out]."""
        own = slice(first, first + len(values))
        scores = values.square().mul_(self.pivots[own, None])
        if self.allowed is not None:
            scores.masked_fill_(~self.allowed[own], -1)
        keep = self._of(scores)
        return keep if self.allowed is None else keep & self.allowed[own]

    def _of(self, scores: Tensor) -> Tensor:
        rows, pattern = scores.shape[1], self.sparsity.pattern
        if pattern is None:
            share = self.sparsity.share or 0.0
            drop = count(share, rows * self.part.stop) - count(share, rows * self.part.start)  # exact over the matrix
            return keep_highest(scores.view(1, -1), drop).view(scores.shape)
        if len(scores) < pattern[1]:
            return torch.ones_like(scores, dtype=torch.bool)
        return keep_of_first(scores, pattern[0])


def _pruned(values: Tensor, effects: Tensor, choice: _Choice, keep: Tensor, rounding: Rounding | None) -> Tensor:
    """Go through a block, and tell how far its columns were from what is left of them when their turn came.

    values:  [columns, out], with the effect of all columns before the block; becomes the columns at their turn
    effects: [columns, columns], lower triangular: [i, j] is what a unit dropped of column j takes from column i
    keep:    bool [columns, out], set here
    """
    lost, pattern = torch.empty_like(values), choice.sparsity.pattern
    if pattern is None:
        keep.copy_(choice.keep(values))
    few = pattern[1] if pattern else _COLUMNS
    light = _light(values), _light(lost), _light(keep), _light(effects)
    for first in range(0, len(values), few):
        now = slice(first, min(first + few, len(values)))
        values[now].addmm_(effects[now, :first], lost[:first], alpha=-1)
        if pattern is not None:
            keep[now] = choice.keep(values[now], first)
        _drop(light[0][now], light[1][now], light[2][now], light[3][now, now], choice.part.start + first, rounding)
    return lost


def _drop(values: Light, lost: Light, keep: Light, effects: Light, first: int, rounding: Rounding | None) -> None:
    """Go through a few columns, [columns, out], that all columns before them have had their effect on."""
    for i in range(len(values)):
        lost[i] = values[i] - keep[i] * (rounding(values[i], first + i) if rounding else values[i])
        if i + 1 < len(values):
            values[i + 1 :] -= effects[i + 1 :, i : i + 1] * lost[i]


def _inverse(upper: Tensor) -> Tensor:
    """Of a unit upper triangular matrix."""
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True, unitriangular=True)


def _light(matrix: Tensor) -> Light:
    """The same memory as numpy has it, where it can: for matrices of a few columns its calls take far less time."""
    return matrix.numpy() if matrix.device.type == "cpu" else matrix


# The grid


@dataclass(frozen=True)
class _Scales:
    scales: Tensor  # [out, groups], in the type that is stored
    zeros: Tensor | None  # int8 [out, groups]
    group_index: Tensor  # int64 [in]


def _fitted(weight: Tensor, grid: Grid | None, dtype: torch.dtype, clip: Clip | None) -> _Scales | None:
    if grid is None:
        return None
    scales, zeros = fit(weight, grid, dtype=dtype, clip=clip)
    return _Scales(scales, zeros, grid.group_index(weight.shape[1], weight.device))


def _rounding(scales: _Scales | None, grid: Grid | None) -> Rounding | None:
    """What `encode` and `values` do to one column."""
    if scales is None or grid is None:
        return None
    steps = _light(scales.scales.float().t().contiguous())
    zeros = None if scales.zeros is None else _light(scales.zeros.float().t().contiguous())
    groups = scales.group_index.tolist()

    def rounded(column: Light, number: int) -> Light:
        group = groups[number]
        if zeros is None:
            return (column / steps[group]).round().clip(grid.lowest, grid.highest) * steps[group]
        codes = (column / steps[group] + zeros[group]).round().clip(grid.lowest, grid.highest)
        return (codes - zeros[group]) * steps[group]

    return rounded


def _encoded(weight: Tensor, scales: _Scales | None, grid: Grid | None) -> Quantized | None:
    if scales is None or grid is None:
        return None
    codes = encode(weight, scales.scales, scales.zeros, scales.group_index, grid)
    return Quantized(codes, scales.scales, scales.zeros, scales.group_index)
