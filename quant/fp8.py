"""FP8: every weight to the nearest float8_e4m3fn under the scale of its block, without calibration.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433 (section 3); blocks of
128 x 128 as in DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, https://arxiv.org/abs/2412.19437 (section 3.3).
The largest weight of a block lands on the largest code:

    scale = max |weight| / 448,    code = nearest(weight / scale)
"""

import torch
from torch import Tensor

from wtool.formats.fp8 import LARGEST, Blocks, encode, largest_in_blocks


def fp8(weight: Tensor, blocks: Blocks, *, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a matrix.

    weight:      [out, in], of any float type, finite
    blocks:      which weights share a scale
    scale_dtype: the type that scales are stored in; codes are nearest with the scales as stored

    returns: codes float8_e4m3fn [out, in]; scales [blocks, blocks], above 0 (1 where all weights are 0)
    """
    scales = stored_scales(largest_in_blocks(weight, blocks), scale_dtype)
    return encode(weight, scales, blocks), scales


def stored_scales(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of a type for blocks with these largest magnitudes.

    None is below the type's smallest normal number: its last bits would be gone, and a block of float16 beyond 448.
    """
    scales = (largest / LARGEST).clamp(min=torch.finfo(dtype).smallest_normal)
    return scales.masked_fill(largest == 0, 1).to(dtype)
