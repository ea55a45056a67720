"""Float32 to 16 bits at random: up or down with the chance that makes the mean the number itself.

To the nearest, a change smaller than half the distance of two bfloat16 numbers (1/256 to 1/512 of the weight) is
lost, and so is most of a short training, each of whose steps is smaller than that. At random such changes are kept in
the mean over a matrix, which is what its product with a vector of many entries sees. Forsythe, "Reprint of a note on
rounding-off errors", SIAM Review 1(1), 1959; Gupta et al., "Deep Learning with Limited Numerical Precision", 2015,
https://arxiv.org/abs/1502.02551 (section 3.1).
"""

import numpy as np
import torch
from torch import Tensor

_TOGETHER = 1 << 17  # numbers, so that what is made of them stays in the processor's cache
# bits of a float32's mantissa that a type has not; the largest number of it
_DROPPED = {torch.bfloat16: (16, torch.finfo(torch.bfloat16).max), torch.float16: (13, torch.finfo(torch.float16).max)}


def stochastic(tensor: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor in another type, rounded at random where that is a float of 16 bits, else to the nearest.

    What the type holds exactly stays as it is, and so do zeros, infinities and NaN; nothing finite becomes infinite
    that would not to the nearest. Float16 numbers below its smallest normal one (6.1e-5) go to the nearest.

    tensor: of any type, of any shape, on the CPU; float32 or less is rounded, float64 first to float32
    seed: the same seed rounds the same tensor the same way
    """
    if dtype not in _DROPPED or tensor.dtype in (dtype, *_DROPPED) or not tensor.is_floating_point():
        return tensor.to(dtype)
    generator = np.random.PCG64DXSM(seed)
    result = torch.empty(tensor.shape, dtype=dtype)
    for some, rounded in zip(tensor.reshape(-1).split(_TOGETHER), result.view(-1).split(_TOGETHER), strict=True):
        rounded.copy_(_rounded(some.float(), dtype, generator))
    return result


def _rounded(plain: Tensor, dtype: torch.dtype, generator: np.random.PCG64DXSM) -> Tensor:
    dropped, largest = _DROPPED[dtype]
    drawn = generator.random_raw(-(-plain.numel() // 4)).view(np.uint16)[: plain.numel()]  # 16 bits a number
    noise = torch.from_numpy((drawn >> (16 - dropped)).astype(np.int32))
    up_or_down = noise.add_(plain.view(torch.int32)).bitwise_and_(-1 << dropped).view(torch.float32).to(dtype)
    if plain.numel() and plain.abs().amax().item() < largest:
        return up_or_down
    return torch.where(plain.abs() < largest, up_or_down, plain.to(dtype))
