"""RTN: every weight to the nearest point of its group's grid, without calibration."""

import torch
from torch import Tensor

from wtool.grid import Clip, Grid, Quantized, encode, fit


def rtn(weight: Tensor, grid: Grid, *, scale_dtype: torch.dtype, clip: Clip | None = None) -> Quantized:
    """Round a matrix.

    weight:      [out, in], of any float type
    scale_dtype: the type that scales are stored in; codes are nearest with the scales as stored
    clip:        a search for the share of each group's range to cover; None covers all of it
    """
    scales, zeros = fit(weight, grid, dtype=scale_dtype, clip=clip)
    group_index = grid.group_index(weight.shape[1], weight.device)
    return Quantized(encode(weight, scales, zeros, group_index, grid), scales, zeros, group_index)
