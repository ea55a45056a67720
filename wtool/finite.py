"""Telling NaN and infinity, fast enough to look at every weight that is written."""

from math import isfinite

import torch

from wtool.errors import RuntimeProblem

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 1 << 18  # elements


def refuse_nonfinite(tensor: torch.Tensor, name: str) -> None:
    """Refuse weights that have no order and no rounding.

    name: how the error calls them
    raises: RuntimeProblem
    """
    if (element := first_nonfinite(tensor)) is not None:
        value = tensor.reshape(-1)[element].item()
        raise RuntimeProblem(f"{name} has {value} at element {element}; --ignore leaves a module as it is")


def first_nonfinite(tensor: torch.Tensor) -> int | None:
    """The flat index of the first NaN or infinite element; None if there is none, or the type has none."""
    if tensor.dtype not in _TYPES or isfinite(tensor.detach().sum().item()):
        return None
    flat = tensor.detach().reshape(-1)  # of which one is not finite, or so large ones that their sum was not
    for begin in range(0, flat.numel(), _CHUNK):
        is_bad = flat[begin : begin + _CHUNK].isfinite().logical_not_()
        if is_bad.any():
            return begin + int(is_bad.nonzero()[0])
    return None
