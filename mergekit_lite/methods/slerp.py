"""Slerp: from one model to another along the arc between their directions.

Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, https://doi.org/10.1145/325165.325242;
for model weights a tensor is taken as one long vector, and its length is interpolated along:

    out = sin((1-t) a) / sin(a) * v0 + sin(t a) / sin(a) * v1,    a the angle between v0 and v1

Where the arc is not defined (a zero vector), or is no different from the straight line (cosine beyond 0.9995,
towards either end), the line (1-t) v0 + t v1 is taken.
"""

from collections.abc import Sequence
from math import acos, sin, sqrt

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic.gram import gram
from .linear import between, weighted_sum

STRAIGHT = 0.9995  # beyond this cosine, the line


@InPieces
def slerp(models: Sequence[Tensor], *, t: float, dtype: torch.dtype | None = None) -> Pieces:
    """Interpolate between two tensors of one shape.

    t: 0 gives the first, 1 the second, exactly; values beyond extrapolate
    """
    angle = angle_between(*models)
    if angle is None:
        return between(*models, share=t, dtype=dtype)
    first, second = sin((1.0 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)

    return weighted_sum(models, [first, second], dtype)


def angle_between(first: Tensor, second: Tensor) -> float | None:
    """The angle between two vectors, in radians; None where it is not defined or the arc is as good as straight."""
    (square0, dot), (_, square1) = gram(None, [first, second]).tolist()
    if square0 == 0.0 or square1 == 0.0:
        return None
    cosine = max(-1.0, min(1.0, dot / (sqrt(square0) * sqrt(square1))))
    return None if abs(cosine) > STRAIGHT else acos(cosine)
