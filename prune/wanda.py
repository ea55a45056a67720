"""Wanda: drop the weights whose |weight| times input norm is lowest in their row.

Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023,
https://arxiv.org/abs/2306.11695 (equation 1): score of W[i, j] = |W[i, j]| · |X_j|₂.
"""

import torch
from torch import Tensor

from .pattern import Sparsity
from .selection import keep_by_row


def wanda_mask(weight: Tensor, norm: Tensor, sparsity: Sparsity) -> Tensor:
    """Tell which weights to keep.

    weight:  [out, in], of any float type
    norm:    [in], l2 norm of each input feature over the calibration tokens, or any multiple of it
    returns: bool [out, in], True where the weight stays
    """
    return keep_by_row(wanda_scores(weight, norm), sparsity)


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """|weight| · norm, float32 [out, in]."""
    return weight.float().abs() * usable_norm(norm).float()


def usable_norm(norm: Tensor) -> Tensor:
    """The norms, or ones where all are 0: an input that calibration never saw leaves the magnitudes to decide.

    Of zeros every score would be 0, and the first columns would go.
    """
    return norm if bool(norm.any()) else torch.ones_like(norm)


def input_norm(gram: Tensor) -> Tensor:
    """The norms of input features, up to a factor that they share, from the mean of x xᵀ [in, in]; [in]."""
    return gram.diagonal().clamp(min=0).sqrt()
