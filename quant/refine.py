"""What can be gained after a rounding: codes and scales changed in turn, each to what is best with all others fixed.

With E the weights minus the quantized weights and G the damped Gram matrix of the inputs, this is coordinate descent on
tr(E G Eᵀ). With all other columns fixed, column j of the quantized weights is best at the point of the grid nearest to

    W[:, j] + Σ_{i≠j} E[:, i] G[i, j] / G[j, j]

(cyclic, as in Nair and Suggala, "CDQuant: Greedy Coordinate Descent for Accurate LLM Quantization", 2024,
https://arxiv.org/abs/2406.17542). With the codes fixed, the scale of a group whose codes, less the zero, are c is best
moved by Σ_j (E G)[j] c[j] / (c G cᵀ), j over the group's columns. No step makes the error of a row larger, but for the
rounding of float32: scales move to the nearest that can be stored.

The damped matrix is never made: what damping adds to the diagonal goes along beside the one that was gathered.
"""

from dataclasses import replace

import torch
from torch import Tensor

from wtool.grid import Grid, Quantized
from wtool.statistics import output_squares

from .sweep import Scales, sweep


def added(gram: Tensor, damping: float) -> Tensor:
    """What damping adds to the diagonal of a Gram matrix, float32 [in]: 1 where it is 0, then a share of its mean."""
    diagonal = gram.diagonal()
    ones = (diagonal == 0).to(gram.dtype)
    return ones + damping * (diagonal + ones).mean()


def refine_codes(weight: Tensor, gram: Tensor, added: Tensor, quantized: Quantized, grid: Grid) -> Quantized:
    """Every code in turn at its best for all others.

    weight: [out, in]
    gram:   float32 [in, in]
    added:  float32 [in], to the diagonal of the Gram matrix
    """
    lying = quantized.values().t().contiguous()  # [in, out]
    zeros = None if quantized.zeros is None else quantized.zeros.float().t().contiguous()[None]
    scales = Scales(quantized.scales.float().t().contiguous()[None], zeros, quantized.group_index[None])
    coupling = (gram / (gram.diagonal() + added)).fill_diagonal_(1)
    values = torch.addmm(lying, coupling.t(), weight.float().t() - lying)
    sweep(values[None], lying[None], coupling[None], scales, grid)
    return replace(quantized, codes=values.to(torch.int8).t().contiguous())


def refit_scales(weight: Tensor, gram: Tensor, added: Tensor, quantized: Quantized) -> Quantized:
    """The scales of one group after the other at their best for the codes; the arguments are those of refine_codes."""
    codes = quantized.codes.float()
    if quantized.zeros is not None:
        codes -= quantized.zeros.float().index_select(1, quantized.group_index)
    scales = quantized.scales.clone()
    errors = weight.float() - quantized.values()
    for group in range(scales.shape[1]):
        columns = _place((quantized.group_index == group).nonzero()[:, 0])
        own, more = codes[:, columns], added[columns]
        asked = (errors @ gram[:, columns]).addcmul_(errors[:, columns], more).mul_(own).sum(dim=1)
        spread = (own @ gram[columns][:, columns]).addcmul_(own, more).mul_(own).sum(dim=1)
        before = scales[:, group].float()
        best = (before + asked / spread).to(scales.dtype)
        usable = (spread > 0) & best.isfinite() & (best != 0)
        scales[:, group] = torch.where(usable, best, scales[:, group])
        errors[:, columns] -= own * (scales[:, group].float() - before)[:, None]
    return replace(quantized, scales=scales)


def _place(columns: Tensor) -> slice | Tensor:
    """Columns, as a slice where they are neighbours: what is taken of a matrix is a view of it then, and no copy."""
    begin, end = int(columns[0]), int(columns[-1]) + 1
    return slice(begin, end) if end - begin == len(columns) else columns


def better_rows(weight: Tensor, gram: Tensor, added: Tensor, first: Quantized, second: Quantized) -> Quantized:
    """Each row of the one with the smaller error; zeros and groups of the two must be the same."""
    errors = []
    for quantized in (first, second):
        off = weight.float() - quantized.values()
        errors.append(output_squares(off, gram) + off.square() @ added)
    keep = (errors[0] <= errors[1])[:, None]
    codes = torch.where(keep, first.codes, second.codes)
    return replace(first, codes=codes, scales=torch.where(keep, first.scales, second.scales))
