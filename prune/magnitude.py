"""Magnitude: drop the weights nearest to zero.

Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015,
https://arxiv.org/abs/1506.02626. One threshold for the whole matrix; no data is needed.
"""

from torch import Tensor

from .pattern import Sparsity
from .selection import keep_by_matrix


def magnitude_mask(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """Tell which weights to keep.

    weight:  [out, in], of any float type
    returns: bool [out, in], True where the weight stays
    """
    return keep_by_matrix(weight.float().abs(), sparsity)
