"""Telling NaN and infinity, fast enough to look at every weight that is written."""

import numpy as np
import torch

# float type -> (unsigned integer of the same size, its exponent bits); all exponent bits set means NaN or infinity
_EXPONENTS = {
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
}
_CHUNK = 1 << 17  # elements; fits the processor's cache


def first_nonfinite(tensor: torch.Tensor) -> int | None:
    """The flat index of the first NaN or infinite element; None if there is none, or the type has none."""
    if tensor.dtype not in _EXPONENTS:
        return None
    integer, exponent = _EXPONENTS[tensor.dtype]
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy().view(integer)
    scratch = np.empty(min(_CHUNK, flat.size), dtype=integer)
    for begin in range(0, flat.size, _CHUNK):
        part = flat[begin : begin + _CHUNK]
        bits = np.bitwise_and(part, integer(exponent), out=scratch[: part.size])
        if bits.max() == exponent:
            return begin + int(np.argmax(bits == exponent))
    return None
