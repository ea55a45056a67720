"""What each grid would cost a matrix: the squared error of its outputs, as far as the model's answer hangs on them.

With E what a grid takes from the weights and G the Gram matrix of the inputs, row r of E G Eᵀ has on its
diagonal the mean squared error of output r. To the second order the Kullback-Leibler divergence of the model's
next-token distribution from what it was is ½ eᵀ F e, F the Fisher information of the outputs; of F its diagonal is
taken, s[r] = a mean of g[r]², g the gradient by output r of log p(y) with y drawn from the model itself (`wtool.
output_gradients` tells which), which is the factored curvature of Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", 2015, https://arxiv.org/abs/1503.05671. So

    loss = ½ Σ_r s[r] (E G Eᵀ)[r, r]

is in nats per token, and can be added over matrices. Without gradients s is the same for all rows of a matrix, such
that the loss is the share of its outputs' squares: a matrix counts as much as any other.

E is of the method that will follow, as far as it goes by itself: of GPTQ where columns make up for one another's errors
or rounding is learned, else of rounding. Rounding alone would not tell of GPTQ: where a few inputs are large (those of
down_proj, whose first token may be hundreds of times as long as others), nearly all of its error is theirs, which the
other columns make up for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.grid import Clip, Grid

from .gptq import Settings, gptq_on
from .rtn import rtn

ROWS = 256  # of a matrix, evenly spread, that stand for all
CLIP = Clip(steps=4)  # coarser than what follows searches


def losses(
    weight: Tensor,
    gram: Tensor,
    grids: Sequence[Grid],
    *,
    settings: Settings,
    compensating: bool,
    importance: Tensor | None,
) -> list[float]:
    """The loss of each grid.

    weight:       [out, in], of any float type
    gram:         float32 [in, in], mean of x xᵀ over calibration tokens
    settings:     of GPTQ; of rounding, the type of scales and the search for clips
    compensating: the errors of GPTQ, not of rounding
    importance:   [out], mean squared gradient by each output, in nats²; None where it is not known

    returns: at least 0, per token that comes to the matrix; in nats where importance is known, else as a share of the
             outputs' squares
    """
    chosen = torch.arange(min(ROWS, len(weight))) * len(weight) // min(ROWS, len(weight))
    rows = weight[chosen].float()
    if importance is None:
        weighting = torch.full((len(rows),), 1 / max(_squares(rows, gram).sum().item(), 1e-30))
    else:
        weighting = importance[chosen].float() * (0.5 * len(weight) / len(rows))
    if compensating:
        quantized = gptq_on(rows, gram, grids, settings)
    else:
        quantized = [rtn(rows, grid, scale_dtype=settings.scale_dtype, clip=settings.clip) for grid in grids]
    found: list[float] = []
    for each in quantized:
        off = rows - each.values()
        found.append(max(0.0, float(_squares(off, gram).mul_(weighting).sum(dtype=torch.float64))))
    return found


def _squares(matrix: Tensor, gram: Tensor) -> Tensor:
    """The mean squared outputs of rows [rows, in], [rows]."""
    return (matrix @ gram).mul_(matrix).sum(dim=1)
