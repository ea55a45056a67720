"""Multi-SLERP: the mean of the models' directions, brought to the mean of their lengths.

The spherical mean of Goddard's multislerp (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea): directions
are averaged at the point m where their weighted mean meets the sphere. There the weighted tangents
sum_i w_i (u_i - <u_i, m> m) cancel, because sum_i w_i u_i is parallel to m, so that what is left is

    u_i = x_i / |x_i|,   out = sum_i w_i |x_i| * sum_i w_i u_i / |sum_i w_i u_i|,   x_i = theta_i, or theta_i - theta_0

Karcher's mean (karcher.py) goes on from there to the point with the least squared angles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic.gram import combine, cosines

NOISE = 1e-7  # a mean of directions shorter than this points nowhere: it is float64's rounding of the cosines


@InPieces
def multislerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Merge any number of tensors (with a base: their differences to it) by direction and length.

    weight:            one a model, of any sign
    normalize_weights: divide the weights by their sum; weights that sum to 0 are left as they are
    eps:               least length of the mean direction; 1e-7 at least

    Where the directions cancel (opposite vectors), the weighted sum is taken: the straight line between two. Models
    that all equal the base give the base.
    """
    total = sum(weight) if normalize_weights else 1.0
    shares = torch.tensor([w / (1.0 if abs(total) < 1e-8 else total) for w in weight], dtype=torch.float64)

    def factors(gram: Tensor) -> Tensor:
        length, cosine = cosines(gram)
        size = (shares @ cosine @ shares).clamp_min(0.0).sqrt()[:, None]
        scale = (length @ shares)[:, None] / size
        turned = torch.where(length > 0.0, shares * scale / length, 0.0)
        return torch.where(size > max(eps, NOISE), turned, shares)

    return combine(base, models, factors, dtype=dtype)
