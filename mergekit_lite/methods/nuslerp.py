"""NuSLERP: spherical interpolation between two models with a weight each, of the whole tensor or of each row or column.

As slerp (Shoemake 1985, https://doi.org/10.1145/325165.325242), with t = w_1 / (w_0 + w_1) and, where there is a
base, of the task vectors:

    out = sin((1-t) a) / sin(a) * v0 + sin(t a) / sin(a) * v1,    a the angle between v0 and v1

Where the arc is not defined (a zero vector, vectors on one line) the line (1-t) v0 + t v1 is taken; unlike slerp's,
the angle may be as small as you like.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic.gram import combine, cosines

ON_A_LINE = 1e-6  # the angle's sine, below which the direction of the arc is float32's rounding
AXES = {"tensor": None, "rows": -1, "columns": -2}


@InPieces
def nuslerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    vectors: str | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Interpolate between two tensors, or between their differences to a base.

    weight:  of the first and the second; where they sum to 0, half of each
    vectors: what is turned: "tensor", each of the "rows" (along the last axis), or each of the "columns" (along the
             last but one); tensors of one axis are one vector. None goes by mergekit's two switches:
    nuslerp_flatten:  the whole tensor
    nuslerp_row_wise: else, despite its name, False is each row and True each vector along the first axis
    """
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    axis = AXES[vectors] if vectors else (None if nuslerp_flatten else 0 if nuslerp_row_wise else -1)

    def factors(gram: Tensor) -> Tensor:
        length, cosine = cosines(gram)
        angle = cosine[:, 0, 1].acos()[:, None]
        arc = torch.cat([torch.sin((1.0 - t) * angle), torch.sin(t * angle)], dim=1) / angle.sin()
        is_arc = (angle.sin() > ON_A_LINE) & (length > 0.0).all(dim=1, keepdim=True)
        return torch.where(is_arc, arc, torch.tensor([1.0 - t, t], dtype=torch.float64))

    return combine(base, models, factors, axis=axis, dtype=dtype)
