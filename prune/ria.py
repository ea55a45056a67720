"""RIA: drop the weights that matter least beside the others of their row and of their column.

Zhang, Bai, Lin, Zhao, Hou and Cannistraci, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models", ICLR 2024, https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning. With the
relative importance

    RI[i, j] = |W[i, j]| / Σ_k |W[k, j]| + |W[i, j]| / Σ_k |W[i, k]|,    score = RI[i, j] · |X_j|₂^a

An input or an output whose weights are all small keeps some of them. As scores are relative to rows and columns
already, one threshold serves the whole matrix, as in the authors' code.
"""

import torch
from torch import Tensor

from .pattern import Sparsity
from .selection import keep_by_matrix
from .wanda import usable_norm


def ria_mask(weight: Tensor, norm: Tensor, sparsity: Sparsity, *, power: float = 0.5) -> Tensor:
    """Tell which weights to keep.

    weight:  [out, in], of any float type
    norm:    [in], l2 norm of each input feature over the calibration tokens, or any multiple of it
    power:   a, how much the norms count; 0 is not at all
    returns: bool [out, in], True where the weight stays
    """
    return keep_by_matrix(ria_scores(weight, norm, power), sparsity)


def ria_scores(weight: Tensor, norm: Tensor, power: float = 0.5) -> Tensor:
    """The scores, float32 [out, in]; 0 in rows and columns of zeros."""
    size = weight.float().abs()
    scores = size / _divisor(size.sum(dim=0))
    scores += size / _divisor(size.sum(dim=1, keepdim=True))
    return scores.mul_(usable_norm(norm).float() ** power)


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)
