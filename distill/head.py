"""How hidden states become logits: z = cap(scale (h Wᵀ + b)), with cap(x) = c tanh(x / c) where there is a cap."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wtool.products import in_bfloat16

_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Head:
    """How hidden states become logits.

    weight:  [V, hidden]; may require a gradient or not
    bias:    [V]
    scale:   multiplies the logits
    softcap: bound of the logits, above 0
    short:   all numbers to be multiplied are bfloat16's, whatever type they are in: rounding to it loses nothing
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    short: bool = False

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def prepared(self, hidden: Tensor, vocabulary: int) -> "Head":
        """The first tokens of the vocabulary alone, without a graph, the weight in the type to multiply `hidden` in."""
        bias = None if self.bias is None else self.bias.detach()[:vocabulary]
        weight = self.weight.detach()[:vocabulary].to(product_dtype(hidden, self))
        return replace(self, weight=weight, bias=bias, short=hidden.dtype == self.weight.dtype == torch.bfloat16)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of a few tokens.

        hidden:  [tokens, hidden], of the weight's type
        returns: [tokens, V], float32 or better
        """
        with in_bfloat16() if self.short else nullcontext():
            logits = product(hidden, self.weight.t())
        if self.bias is not None:
            logits.add_(self.bias)
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The derivative by h Wᵀ, of that by the logits [tokens, V]; made in the memory of both."""
        if self.softcap is not None:  # cap'(x) = 1 - (z / c)²
            gradient.sub_(logits.div_(self.softcap).square_().mul_(gradient))
        return gradient if self.scale == 1 else gradient.mul_(self.scale)


def product_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """The type to multiply hidden states and head in.

    float32 (float64 of float64), but on a GPU the 16-bit type that both have or that autocast asks for: the products of
    its numbers are exact in float32, in which they are added.
    """
    if hidden.dtype == torch.float64:
        return torch.float64
    if hidden.is_cuda:
        asked = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
        if asked in _LOW and (asked == head.weight.dtype or torch.is_autocast_enabled("cuda")):
            return asked
    return torch.float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in new memory, float32 or better."""
    if left.dtype in _LOW:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
