"""Passthrough: one model's tensor as it is, or scaled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear import weighted_sum


def passthrough(models: Sequence[Tensor], *, scale: float | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return the only model's tensor, times `scale` if one is given."""
    (model,) = models
    if scale is None or scale == 1.0:
        return model.to(dtype or model.dtype).contiguous()
    return weighted_sum([model], [scale], dtype)
