"""Low rank: a matrix as two factors, which are multiplied on reading.

A `P.weight` [m, n], as it lies in the checkpoint, becomes
    P.low_rank_u    [m, r]
    P.low_rank_v    [r, n]
and config.json says `"wtool_low_rank": {"P": r, …}`. No other tool multiplies them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wtool.dtypes import TensorInfo

if TYPE_CHECKING:
    import torch

KEY = "wtool_low_rank"
U, V = "low_rank_u", "low_rank_v"


def layout(shape: tuple[int, int], rank: int, dtype: str) -> dict[str, TensorInfo]:
    """The tensors that a weight becomes, by suffix."""
    return {U: TensorInfo(dtype, (shape[0], rank)), V: TensorInfo(dtype, (rank, shape[1]))}


def multiply(parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
    """The matrix that factors stand for, in float32, or in float64 if they are."""
    import torch

    u, v = (parts[part] if parts[part].dtype == torch.float64 else parts[part].float() for part in (U, V))
    return u @ v
