"""Float32 to 16 bits at random: up or down with the chance that makes the mean the number itself.

To the nearest, a change smaller than half the distance of two bfloat16 numbers (1/256 to 1/512 of the weight) is
lost, and so is most of a short training, each of whose steps is smaller than that. At random such changes are kept in
the mean over a matrix, which is what its product with a vector of many entries sees. Forsythe, "Reprint of a note on
rounding-off errors", SIAM Review 1(1), 1959; Gupta et al., "Deep Learning with Limited Numerical Precision", 2015,
https://arxiv.org/abs/1502.02551 (section 3.1).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wtool.pieces import Pieces, pieces_of
from wtool.random_bits import RandomBits

Rounding = Callable[[int, Tensor, Tensor], None]
"""(First element, a piece, room for it in the type to round to.)"""

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
    return rounded(pieces_of(tensor), dtype, AtRandom(dtype, seed)).whole()


class AtRandom:
    """The rounding of a tensor's elements at random, to a type of 16 bits, as `stochastic` tells of it."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self._dropped, self._largest = SHORT[dtype]
        self._bits = RandomBits(seed)

    def __call__(self, begin: int, plain: Tensor, out: Tensor) -> None:
        """plain: float32, which is overwritten"""
        from wtool.loops import shake

        shake(plain.numpy(), self._bits.take(begin, plain.numel()), self._dropped, self._largest)
        out.copy_(plain)


def rounded(made: Pieces, dtype: torch.dtype, rounding: Rounding) -> Pieces:
    """Pieces in another type.

    made: able to fill in float32, which is what is rounded
    """

    def fill(begin: int, out: Tensor) -> None:
        plain = torch.empty(out.numel(), dtype=torch.float32)
        made.fill(begin, plain)
        rounding(begin, plain, out)

    return Pieces(made.shape, dtype, fill, made.unit)
