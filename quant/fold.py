"""Scales folded into tensors, so that the model computes what it did: divided where they come from, multiplied where
they go. Pure arithmetic, in float32; tensors get the type they had, or the one asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """What is done to a matrix [out, in]."""

    rows: Tensor | None = None  # float32 [out]: divide by
    columns: Tensor | None = None  # float32 [in]: multiply by

    def of(self, matrix: Tensor) -> Tensor:
        """The matrix scaled, float32."""
        matrix = matrix.float()
        matrix = matrix if self.columns is None else matrix * self.columns.to(matrix.device)
        return matrix if self.rows is None else matrix / self.rows.to(matrix.device)[:, None]

    def of_bias(self, bias: Tensor) -> Tensor:
        return bias.float() if self.rows is None else bias.float() / self.rows.to(bias.device)


def with_rows(scaling: Scaling, begin: int, scales: Tensor, outputs: int) -> Scaling:
    """The same, with some rows divided by scales too."""
    rows = torch.ones(outputs, device=scales.device) if scaling.rows is None else scaling.rows.clone()
    rows[begin : begin + len(scales)] *= scales
    return Scaling(rows, scaling.columns)


def with_columns(scaling: Scaling, scales: Tensor) -> Scaling:
    """The same, with the columns multiplied by scales too."""
    return Scaling(scaling.rows, scales if scaling.columns is None else scaling.columns * scales)


def divided_norm(weight: Tensor, scales: Tensor, dtype: torch.dtype, *, offset: int) -> tuple[Tensor, Tensor]:
    """The weight of a norm with its output divided by scales, and the scales by which it then is divided indeed.

    The weight is rounded to its type, and what that does to the quotient goes into the scales, so that nothing is lost.
    Where either weight is 0 (or its norm's factor is) the channel stays as it is.

    weight: [channels], of any float type; the norm multiplies by offset + weight
    scales: float32 [channels], positive
    dtype:  the type that the new weight is to have
    """
    factor = weight.float() + offset
    changed = (factor / scales - offset).to(dtype)
    quotient = factor / (changed.float() + offset)
    usable = quotient.isfinite() & (quotient > 0) & changed.isfinite()
    kept = weight.to(dtype)
    own = torch.where(usable, quotient, factor / (kept.float() + offset)).nan_to_num(1.0, 1.0, 1.0)
    return torch.where(usable, changed, kept), own
