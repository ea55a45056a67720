"""Float32 to 16 bits at random: up or down with the chance that makes the mean the number itself.

To the nearest, a change smaller than half the distance of two bfloat16 numbers (1/256 to 1/512 of the weight) is
lost, and so is most of a short training, each of whose steps is smaller than that. At random such changes are kept in
the mean over a matrix, which is what its product with a vector of many entries sees. Forsythe, "Reprint of a note on
rounding-off errors", SIAM Review 1(1), 1959; Gupta et al., "Deep Learning with Limited Numerical Precision", 2015,
https://arxiv.org/abs/1502.02551 (section 3.1).
"""

import torch
from torch import Tensor

from wtool.pieces import Pieces, pieces_of
from wtool.random_bits import RandomBits

# types of 16 bits -> bits of a float32's mantissa that one has not; the largest number of it
SHORT = {torch.bfloat16: (16, torch.finfo(torch.bfloat16).max), torch.float16: (13, torch.finfo(torch.float16).max)}


def stochastic(tensor: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor in another type, rounded at random where that is a float of 16 bits, else to the nearest.

    What the type holds exactly stays as it is, and so do zeros, infinities and NaN; nothing finite becomes infinite
    that would not to the nearest. Float16 numbers below its smallest normal one (6.1e-5) go to the nearest.

    tensor: of any type, of any shape, on the CPU; float32 or less is rounded, float64 first to float32
    seed: the same seed rounds the same tensor the same way
    """
    if dtype not in SHORT or tensor.dtype in SHORT or not tensor.is_floating_point():
        return tensor.to(dtype)
    return at_random(pieces_of(tensor), dtype, seed).whole()


def at_random(made: Pieces, dtype: torch.dtype, seed: int) -> Pieces:
    """The same of a tensor that is made in pieces.

    made: able to fill in float32, which is what is rounded
    dtype: of 16 bits
    """
    (dropped, largest), bits = SHORT[dtype], RandomBits(seed)

    def fill(begin: int, out: Tensor) -> None:
        from wtool.loops import shake, shake_to_bfloat16

        plain = torch.empty(out.numel(), dtype=torch.float32)
        made.fill(begin, plain)
        numbers, noise = plain.numpy(), bits.take(begin, plain.numel())
        if out.dtype == torch.bfloat16:
            shake_to_bfloat16(numbers, noise, largest, out.view(torch.uint16).numpy())
        else:
            shake(numbers, noise, dropped, largest)
            out.copy_(plain)

    return Pieces(made.shape, dtype, fill, made.unit)
