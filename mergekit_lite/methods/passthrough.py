"""Passthrough: one model's tensor as it is, or scaled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces, pieces_of

from .linear import weighted_sum


@InPieces
def passthrough(models: Sequence[Tensor], *, scale: float | None = None, dtype: torch.dtype | None = None) -> Pieces:
    """Return the only model's tensor, times `scale` if one is given."""
    (model,) = models
    if scale is None or scale == 1.0:
        return pieces_of(model, dtype)
    return weighted_sum([model], [scale], dtype)
