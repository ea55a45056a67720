"""Which weights stay, by their scores: exactly as many as are asked for, whatever is tied.

Of equal scores the lower column (in a whole matrix the earlier in row order) is dropped first, as a stable sort does.
Scores are float32 or float64 and must not be NaN. Masks are True where the weight stays.
"""

import numpy
import torch
from torch import Tensor

from .pattern import Sparsity, count

_PAIRS = 8  # neighbours that are compared each with each; more are sorted


def keep_by_row(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """As many of every row.

    scores:  [rows, columns]
    returns: bool [rows, columns]
    """
    if sparsity.pattern is not None:
        return keep_of_neighbours(scores, *sparsity.pattern)
    return keep_highest(scores, count(sparsity.share or 0.0, scores.shape[1]))


def keep_by_matrix(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """As many as asked of the whole matrix, wherever they are; a pattern is by row all the same."""
    if sparsity.pattern is not None:
        return keep_of_neighbours(scores, *sparsity.pattern)
    return keep_highest(scores.reshape(1, -1), count(sparsity.share or 0.0, scores.numel())).view(scores.shape)


def keep_highest(scores: Tensor, drop: int) -> Tensor:
    """All but the `drop` lowest of every row.

    drop: 0 to columns
    """
    if drop in (0, scores.shape[1]):
        return torch.full(scores.shape, drop == 0, dtype=torch.bool, device=scores.device)
    limit = _smallest(scores, drop)
    keep = scores > limit
    lacking = scores.shape[1] - drop - keep.sum(dim=1)  # ties with the limit, all but the one that is dropped
    rows = lacking.nonzero()[:, 0]
    if len(rows):
        ties = scores[rows] == limit[rows]
        number = ties.cumsum(dim=1, dtype=torch.int32)
        keep[rows] |= ties & (number > number[:, -1:] - lacking[rows, None])
    return keep


def _smallest(scores: Tensor, rank: int) -> Tensor:
    """The rank-th smallest of every row, counted from 1, [rows, 1]."""
    if scores.device.type != "cpu":
        return scores.kthvalue(rank, dim=1, keepdim=True).values
    # five times as fast as torch's
    return torch.from_numpy(numpy.partition(scores.numpy(), rank - 1, axis=1)[:, rank - 1 : rank])


def keep_of_neighbours(scores: Tensor, kept: int, of: int) -> Tensor:
    """The highest of every `of` consecutive columns, and all of a tail that is shorter.

    scores: [rows, columns]
    """
    rows, columns = scores.shape
    whole = columns - columns % of
    keep = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    groups = scores[:, :whole].reshape(rows, -1, of)
    keep[:, :whole].view(groups.shape).copy_(keep_of_first(groups.movedim(-1, 0).contiguous(), kept).movedim(0, -1))
    return keep


def keep_of_first(scores: Tensor, kept: int) -> Tensor:
    """The highest along the first dimension, [n, …]."""
    number = len(scores)
    if number > _PAIRS or scores.device.type != "cpu":
        last = scores.movedim(0, -1)
        return keep_highest(last.reshape(-1, number), number - kept).view(last.shape).movedim(-1, 0)
    values = scores.numpy()  # on little ones numpy is several times as fast
    above = numpy.empty(values.shape, dtype=numpy.int8)  # how many are higher; of equals the later ones are
    for i in range(number):
        above[i] = number - 1 - i
    for apart in range(1, number):
        higher = (values[:-apart] > values[apart:]).view(numpy.int8)
        above[apart:] += higher
        above[:-apart] -= higher
    return torch.from_numpy(above < kept)
