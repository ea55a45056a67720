"""A value whose gradient is known already, put into the autograd graph."""

from typing import Any

import torch
from torch import Tensor


def attach(value: Tensor, *known: tuple[Tensor, Tensor]) -> Tensor:
    """Return the value, so that going back from it gives each tensor its gradient.

    value: a scalar, or one value a row of each tensor [rows]; computed without a graph
    known: a tensor, and the gradient of the scalar, or of each row's value, by it: of its shape and dtype

    The gradient is of first order only.
    """
    return _Attached.apply(value, *(tensor for tensor, _ in known), *(gradient for _, gradient in known))


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *both: Tensor) -> Tensor:
        ctx.save_for_backward(*both[len(both) // 2 :])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (output,) = outputs
        gradients: list[Tensor | None] = []
        for gradient in ctx.saved_tensors:
            weight = output.reshape(output.shape + (1,) * (gradient.dim() - output.dim()))
            gradients.append((gradient * weight).to(gradient.dtype))
        return (None, *gradients, *(None for _ in gradients))
