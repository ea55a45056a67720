"""Linear: the weighted mean of the models' weights, element by element. With equal weights, a uniform soup.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", 2022, https://arxiv.org/abs/2203.05482.

    out = sum_i w_i theta_i / sum_i w_i
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic import chunks


@InPieces
def linear(
    models: Sequence[Tensor], *, weight: Sequence[float], normalize: bool = True, dtype: torch.dtype | None = None
) -> Pieces:
    """Return the weighted mean of tensors of one shape.

    weight:    one a model, any finite number
    normalize: divide by the weights' sum (which must not be 0)
    dtype:     of the result; that of the models if None
    """
    total = sum(weight) if normalize else 1.0
    if len(models) == 2 and normalize:
        return between(*models, share=weight[1] / total, dtype=dtype)
    return weighted_sum(models, [w / total for w in weight], dtype)


def weighted_sum(models: Sequence[Tensor], shares: Sequence[float], dtype: torch.dtype | None) -> Pieces:
    """Return sum_i s_i theta_i."""
    factors, work = chunks.of_working_type(models, shares), chunks.work(models, 2)

    def add_up(_: int, parts: tuple[chunks.Array, ...], out: chunks.Array) -> None:
        chunks.kernels().weighted_sum(parts, out, work, factors)

    return chunks.apply(add_up, models, dtype=dtype)


def between(first: Tensor, second: Tensor, *, share: float, dtype: torch.dtype | None = None) -> Pieces:
    """Return the point on the straight line from one tensor to another: (1 - share) first + share second.

    share: 0 gives the first, 1 the second, exactly; values beyond extrapolate
    """
    factor = chunks.of_working_type([first, second], share)[()]

    def step(_: int, parts: tuple[chunks.Array, ...], out: chunks.Array) -> None:
        chunks.kernels().between(*parts, out, chunks.work([first, second], 2), factor)

    line = chunks.apply(step, [first, second], dtype=dtype)
    flat, other = first.reshape(-1), second.reshape(-1)

    def lerp(begin: int, out: Tensor) -> None:
        if not first.dtype == second.dtype == out.dtype:
            line.fill(begin, out)
            return
        end = begin + out.numel()  # torch computes 16-bit types in float32 here, and rounds once
        torch.lerp(flat[begin:end], other[begin:end], share, out=out)

    return replace(line, fill=lerp)
