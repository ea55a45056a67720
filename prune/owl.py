"""OWL: blocks with more outliers among their scores are pruned less.

Yin, Wu, Zhang, Hsieh, Wang, Jia, Li, Jaiswal, Pechenizkiy, Liang, Bendersky, Wang and Liu, "Outlier Weighed Layerwise
Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity", 2023, https://arxiv.org/abs/2310.05175.
With A the Wanda scores of all linears of block l, taken on the dense model, and S the sparsity of the whole,

    D_l = share of A above M · mean(A),    d_l = 2 λ (D_l - min D) / (max D - min D),    S_l = S - (d_l - mean d)

so that the S_l differ by at most 2 λ. The paper's mean is over blocks; here it is over weights, and what a limit cuts
off one block is spread over the others, so that the whole has exactly the sparsity asked for.

`even_by_shape` needs no data: the densities of an Erdős-Rényi graph (Mocanu et al., "Scalable training of artificial
neural networks with adaptive sparse connectivity inspired by network science", 2018,
https://www.nature.com/articles/s41467-018-04316-3), where large matrices are pruned more than small ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HIGHEST = 0.99  # sparsity of a block, at most


def outlier_share(weights: Sequence[Tensor], norms: Sequence[Tensor], *, times_mean: float = 5.0) -> float:
    """D_l of a block: the share of its scores that are above `times_mean` times their mean, in [0, 1 / times_mean).

    weights:    [out, in] each, of the block's linears
    norms:      [in] each, l2 norms of their inputs over the calibration tokens, of the same tokens for all
    times_mean: M, 5 to 7 in the paper, at least 1
    """
    pairs, total = list(zip(weights, norms, strict=True)), sum(weight.numel() for weight in weights)
    level = times_mean * sum(float(_scores(*pair).sum(dtype=torch.float64)) for pair in pairs) / total
    return sum(int((_scores(*pair) > level).sum()) for pair in pairs) / total


def _scores(weight: Tensor, norm: Tensor) -> Tensor:
    """Wanda's, of inputs that were all 0 too."""
    return weight.float().abs() * norm.float()


def owl_shares(
    outliers: Sequence[float], parameters: Sequence[int], share: float, *, spread: float = 0.08
) -> list[float]:
    """The share of each block's weights to drop.

    outliers:   D_l of each block, up to a factor that all share
    parameters: weights that can be dropped of each block
    share:      of all of them to drop, in [0, 1)
    spread:     λ; shares differ by at most twice as much
    """
    low, high = min(outliers), max(outliers)
    width = high - low
    wanted = [2 * spread * (outlier - low) / width if width else 0.0 for outlier in outliers]
    return recentred([share - more for more in wanted], parameters, share)


def recentred(shares: Sequence[float], parameters: Sequence[int], share: float) -> list[float]:
    """Shares moved by one number, none below 0 or above 0.99, so that `share` of all parameters is dropped.

    shares:     of each block or matrix, of any size
    parameters: of each, 1 or more
    share:      in [0, 1); where it is above 0.99 so is the limit
    """
    highest = max(HIGHEST, share)

    def moved(by: float) -> list[float]:
        return [min(max(one + by, 0.0), highest) for one in shares]

    return moved(_solved(moved, parameters, share, -max(shares), highest - min(shares)))


def even_by_shape(shapes: Sequence[tuple[int, int]], share: float) -> list[float]:
    """Shares of matrices [out, in] to drop, such that what is kept of each is in proportion to out + in.

    share: of all their weights to drop, in [0, 1)
    """
    parameters = [rows * columns for rows, columns in shapes]

    def scaled(by: float) -> list[float]:
        return [max(0.0, 1 + by * (rows + columns) / (rows * columns)) for rows, columns in shapes]

    return scaled(_solved(scaled, parameters, share, -float(max(parameters)), 0.0))


def _solved(
    shares: Callable[[float], list[float]], parameters: Sequence[int], share: float, low: float, high: float
) -> float:
    """The number, between two, at which shares that grow with it come to `share` of all parameters."""
    for _ in range(200):
        middle = (low + high) / 2
        dropped = sum(one * count for one, count in zip(shares(middle), parameters, strict=True))
        low, high = (middle, high) if dropped < share * sum(parameters) else (low, middle)
    return high
