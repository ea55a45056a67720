"""What each grid would cost a matrix: the squared error of its outputs, as far as the model's answer hangs on them.

With E what rounding to a grid takes from the weights and G the Gram matrix of the inputs, row r of E G Eᵀ has on its
diagonal the mean squared error of output r. To the second order the Kullback-Leibler divergence of the model's
next-token distribution from what it was is ½ eᵀ F e, F the Fisher information of the outputs; of F its diagonal is
taken, s[r] = the mean of g[r]², g the gradient by output r of log p(y) with y drawn from the model itself (`wtool.
output_gradients`), which is the factored curvature of Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", 2015, https://arxiv.org/abs/1503.05671. So

    loss = ½ Σ_r s[r] (E G Eᵀ)[r, r]

is in nats per token, and can be added over matrices. Without gradients s is the same for all rows of a matrix, such
that the loss is the share of its outputs' squares: a matrix counts as much as any other.

Rounding alone stands for what GPTQ or AWQ will make of the matrix; its errors are larger, and in like proportion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.grid import Clip, Grid

from .rtn import rtn

ROWS = 256  # of a matrix, evenly spread, that stand for all
CLIP = Clip(steps=4)


def losses(
    weight: Tensor,
    gram: Tensor,
    grids: Sequence[Grid],
    *,
    scale_dtype: torch.dtype,
    clip: bool,
    importance: Tensor | None,
) -> list[float]:
    """The loss of each grid.

    weight:     [out, in], of any float type
    gram:       float32 [in, in], mean of x xᵀ over calibration tokens
    importance: [out], mean squared gradient by each output, in nats²; None where it is not known

    returns: at least 0, per token that comes to the matrix; in nats where importance is known, else as a share of the
             outputs' squares
    """
    chosen = torch.arange(min(ROWS, len(weight))) * len(weight) // min(ROWS, len(weight))
    rows = weight[chosen].float()
    if importance is None:
        weighting = torch.full((len(rows),), 1 / max(_squares(rows, gram).sum().item(), 1e-30))
    else:
        weighting = importance[chosen].float() * (0.5 * len(weight) / len(rows))
    found: list[float] = []
    for grid in grids:
        off = rows - rtn(rows, grid, scale_dtype=scale_dtype, clip=CLIP if clip else None).values()
        found.append(max(0.0, float(_squares(off, gram).mul_(weighting).sum(dtype=torch.float64))))
    return found


def _squares(matrix: Tensor, gram: Tensor) -> Tensor:
    """The mean squared outputs of rows [rows, in], [rows]."""
    return (matrix @ gram).mul_(matrix).sum(dim=1)
