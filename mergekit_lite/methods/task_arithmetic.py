"""Task arithmetic: add (or, with a negative weight, take away) what fine-tuning changed.

Ilharco et al., "Editing models with task arithmetic", 2023, https://arxiv.org/abs/2212.04089.

    out = theta_0 + lambda sum_i w_i (theta_i - theta_0)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic.task_vectors import WHOLE, merge_task_vectors


@InPieces
def task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Add weighted task vectors to the base.

    weight:    one a model; negative to unlearn
    normalize: divide the sum by the weights' sum
    lambda_:   factor of the sum
    """
    return merge_task_vectors(
        base,
        models,
        thin=[WHOLE] * len(models),
        weight=weight,
        elect=False,
        normalize=normalize,
        scale=lambda_,
        dtype=dtype,
    )
