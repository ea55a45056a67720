"""Model Stock: how far to go from the base to the mean of the models, told by the angle between them.

Jang, Yun and Han, "Model Stock: all we need is just a few fine-tuned models", 2024,
https://arxiv.org/abs/2403.19522 (section 4, for N models). With c the cosine between the task vectors of two models,
on average over the pairs:

    out = theta_0 + t (mean_i theta_i - theta_0),    t = N c / (1 + (N - 1) c)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic.gram import combine, cosines


@InPieces
def model_stock(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    filter_wise: bool = False,
    clamp: bool = True,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Move the base towards the mean of two or more models.

    filter_wise: an angle for each row (along the last axis) instead of one for the tensor
    clamp:       keep t in [0, 1]; without, task vectors that point apart (c < 0, where the paper's geometry ends)
                 move the base away from the models, and without bound as c nears -1 / (N - 1)

    A model equal to the base stands at right angles to all others (c = 0).
    """

    def factors(gram: Tensor) -> Tensor:
        n = len(models)
        _, cosine = cosines(gram)
        mean = torch.triu(cosine, diagonal=1).sum((-2, -1)) / (n * (n - 1) / 2)
        divisor = 1.0 + (n - 1) * mean
        t = torch.where(divisor.abs() < 1e-6, 0.0, n * mean / divisor)
        return ((t.clamp(0.0, 1.0) if clamp else t) / n)[:, None].expand(-1, n)

    return combine(base, models, factors, axis=-1 if filter_wise else None, dtype=dtype)
