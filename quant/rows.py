"""A matrix quantized by several processes, some rows each: rows do not influence one another.

Of the matrices of a block only those that share an input can be quantized at a time, and often that is one. So their
rows are what is shared out, and all processes have the same to do.
"""

from collections.abc import Callable

from torch import Tensor

from wtool.grid import Quantized
from wtool.ranks import Ranks

from .gptq import Outcome
from .stack import joined


def by_rows(ranks: Ranks, weight: Tensor, quantize: Callable[[Tensor], Outcome]) -> Outcome:
    """Quantize a weight [out, in]; all processes call it with the same one, and have the same outcome."""
    if ranks.size == 1:
        return quantize(weight)
    pieces = weight.tensor_split(min(ranks.size, len(weight)))
    own = quantize(pieces[ranks.rank]) if ranks.rank < len(pieces) else None
    tensors = [] if own is None else [part for part in _parts(own.quantized) if part is not None]
    found = [each for each in ranks.tensors_of_all(tensors, weight.device) if each]
    first = ranks.from_first(None if own is None else (own.damping, own.fallback, own.dead))
    quantized = joined([Quantized(each[0], each[1], each[2] if len(each) == 4 else None, each[-1]) for each in found])
    return Outcome(quantized, *first)


def _parts(quantized: Quantized) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    return quantized.codes, quantized.scales, quantized.zeros, quantized.group_index
