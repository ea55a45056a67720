"""Telling NaN and infinity, fast enough to look at every weight that is written."""

import numpy as np
import torch

from wtool.errors import RuntimeProblem

# float type -> (signed and unsigned integer of the same size, the bits of infinity).
# As signed integers, positive floats sort as their values do, with infinity and NaN at the top; as unsigned ones,
# the negative floats do. So two maxima tell, and no memory is needed.
_TYPES = {
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float32: (np.int32, np.uint32, 0x7F80_0000),
    torch.float64: (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
}
_CHUNK = 1 << 18  # elements; fits the processor's cache, so that the second maximum reads from there


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
    if tensor.dtype not in _TYPES:
        return None
    signed, unsigned, infinity = _TYPES[tensor.dtype]
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy().view(signed)
    minus_infinity = infinity | 1 << 8 * flat.itemsize - 1
    for begin in range(0, flat.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        if part.max() >= infinity or part.view(unsigned).max() >= minus_infinity:
            return begin + int(np.argmax((part & infinity) == infinity))
    return None
