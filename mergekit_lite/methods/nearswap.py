"""NearSwap: take the other model where it is near the base, and go no further than t elsewhere.

Introduced with the merge QuartetAnemoi-70B, 2024, model card alchemonaut/QuartetAnemoi-70B-t0.0001;
there with a share of t / |theta_1 - theta_0| of the way, one at most, which is the same as

    out = theta_1, held between theta_0 - t and theta_0 + t
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wtool.pieces import InPieces, Pieces

from ..arithmetic import chunks


@InPieces
def nearswap(base: Tensor, models: Sequence[Tensor], *, t: float, dtype: torch.dtype | None = None) -> Pieces:
    """Move the base towards the one other model, by at most t in each element.

    t: 0 or more, in the weights' own unit; elements that differ by no more become the other model's exactly
    """
    (model,) = models

    most, work = chunks.of_working_type([base, model], t)[()], chunks.work([base, model], 2)

    def move(_: int, parts: tuple[chunks.Array, ...], out: chunks.Array) -> None:
        chunks.kernels().merge_near(*parts, out, work, most)

    return chunks.apply(move, [base, model], dtype=dtype)
