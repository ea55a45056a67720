"""The walk through tensors in pieces that fit the processor's cache.

Merging is bound by memory traffic: a whole-tensor expression writes and reads every intermediate result through
main memory, and a float32 copy of a bfloat16 embedding is twice the embedding. In pieces, intermediates never
leave the cache, and the memory above inputs and output is a few pieces, whatever the tensor's size.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements; decided by benchmarks/merge

Kernel = Callable[[int, list[Tensor], list[Tensor]], Tensor]
"""(first element, the inputs' pieces in the working type, spare pieces) -> the result's piece.

A kernel may overwrite all pieces it is given, and return any of them.
"""


def working_type(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 if an input is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def result_type(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """The type asked for, else the smallest that holds every input's values."""
    if dtype is not None:
        return dtype
    found = tensors[0].dtype
    for tensor in tensors:
        found = torch.promote_types(found, tensor.dtype)
    return found


def pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (first element, the tensors' pieces in the working type); the pieces' memory is used again."""
    kind = working_type(tensors)
    flat = [tensor.reshape(-1) for tensor in tensors]
    buffers = [torch.empty(min(CHUNK, flat[0].numel()), dtype=kind) for _ in flat]
    for begin in range(0, flat[0].numel(), CHUNK):
        end = min(begin + CHUNK, flat[0].numel())
        yield (
            begin,
            [buffer[: end - begin].copy_(tensor[begin:end]) for buffer, tensor in zip(buffers, flat, strict=True)],
        )


def apply(kernel: Kernel, tensors: Sequence[Tensor], *, spare: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Compute a tensor piece by piece.

    tensors: of one shape, any float types
    spare:   how many further pieces the kernel wants for intermediate results
    dtype:   of the result; the inputs' (promoted) if None
    """
    result = torch.empty(tensors[0].shape, dtype=result_type(tensors, dtype))
    flat = result.view(-1)
    kind = working_type(tensors)
    spares = [torch.empty(min(CHUNK, flat.numel()), dtype=kind) for _ in range(spare)]
    for begin, parts in pieces(tensors):
        size = parts[0].numel()
        flat[begin : begin + size].copy_(kernel(begin, parts, [buffer[:size] for buffer in spares]))
    return result
