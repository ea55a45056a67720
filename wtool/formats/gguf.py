"""GGUF's types of weights, encoded: a matrix in, the bytes of its blocks out.

| type | values | bits per value | what a value is                        |
|------|--------|----------------|----------------------------------------|
| Q8_0 | 32     | 8.5            | d q                                    |
| Q4_0 | 32     | 4.5            | d (q - 8)                              |
| Q4_1 | 32     | 5              | d q + m                                |
| Q5_0 | 32     | 5.5            | d (q - 16)                             |
| Q5_1 | 32     | 6              | d q + m                                |
| Q2_K | 256    | 2.625          | d a q - e b, 16 groups of 16           |
| Q3_K | 256    | 3.4375         | d a q, 16 groups of 16                 |
| Q4_K | 256    | 4.5            | d a q - e b, 8 groups of 32            |
| Q5_K | 256    | 5.5            | d a q - e b, 8 groups of 32            |
| Q6_K | 256    | 6.5625         | d a q, 16 groups of 16                 |

F32, F16 and BF16 are plain. `gguf_search` finds scales, `gguf_super` super-blocks, `gguf_pack` lays the bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wtool.formats import gguf_pack
from wtool.formats.gguf_search import affine, inverse, symmetric
from wtool.formats.gguf_super import SIZE, Kind, fit, half

AT_ONCE = 1 << 16  # values that are encoded together: what they need stays in the processor's cache


@dataclass(frozen=True)
class BlockType:
    """A type of packed weights."""

    number: int  # ggml's
    values: int  # in a block
    nbytes: int  # of a block
    encode: Callable[[Tensor, Tensor], Tensor]  # blocks and weights [blocks, values] -> [blocks, nbytes]

    def row_bytes(self, columns: int) -> int:
        return columns // self.values * self.nbytes


def _around_zero(low: int, high: int, pack: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def encode(x: Tensor, weights: Tensor) -> Tensor:
        d = half(symmetric(x, weights, low, high))
        return pack((x * inverse(d)).round_().clamp_(low, high) - low, d)

    return encode


def _with_minimum(high: int, pack: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def encode(x: Tensor, weights: Tensor) -> Tensor:
        d, m = (half(each) for each in affine(x, weights, high, floor=False))
        return pack(((x - m) * inverse(d)).round_().clamp_(0, high), d, m)

    return encode


def _q8_0(x: Tensor, weights: Tensor) -> Tensor:
    """The range covered: a search would gain nothing that eight bits show."""
    d = half(x.abs().amax(-1, keepdim=True) / 127)
    return gguf_pack.q8_0((x * inverse(d)).round_().clamp_(-127, 127), d)


def _super(kind: Kind, pack: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weights: pack(fit(x, weights, kind))


TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(2, 32, 18, _around_zero(-8, 7, gguf_pack.q4_0)),
    "Q4_1": BlockType(3, 32, 20, _with_minimum(15, gguf_pack.q4_1)),
    "Q5_0": BlockType(6, 32, 22, _around_zero(-16, 15, gguf_pack.q5_0)),
    "Q5_1": BlockType(7, 32, 24, _with_minimum(31, gguf_pack.q5_1)),
    "Q8_0": BlockType(8, 32, 34, _q8_0),
    "Q2_K": BlockType(10, SIZE, 84, _super(Kind(16, 0, 3, 0, 15, minima=True), gguf_pack.q2_k)),
    "Q3_K": BlockType(11, SIZE, 110, _super(Kind(16, -4, 3, -32, 31, minima=False), gguf_pack.q3_k)),
    "Q4_K": BlockType(12, SIZE, 144, _super(Kind(32, 0, 15, 0, 63, minima=True), gguf_pack.q4_k)),
    "Q5_K": BlockType(13, SIZE, 176, _super(Kind(32, 0, 31, 0, 63, minima=True), gguf_pack.q5_k)),
    "Q6_K": BlockType(14, SIZE, 210, _super(Kind(16, -32, 31, -128, 127, minima=False), gguf_pack.q6_k)),
}
PLAIN = {"F32": 0, "F16": 1, "BF16": 30}  # ggml's numbers


def encode(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Encode a matrix, some rows at a time.

    weight:     [rows, columns], of any float type; the columns a multiple of the type's values
    name:       a row of TYPES
    importance: [columns], how much an error in each column counts, >= 0; if None all the same
    returns:    [rows, bytes of a row], uint8
    """
    kind = TYPES[name]
    rows, columns = weight.shape
    assert columns % kind.values == 0, (columns, name)
    # a block none of whose columns counts is encoded like any other; scales of either size give the same codes
    weights = torch.ones(columns) if importance is None else importance.float() / importance.float().mean().clamp(1e-30)
    weights = weights.clamp(min=1e-6).view(-1, kind.values)
    made = torch.empty(rows, kind.row_bytes(columns), dtype=torch.uint8)
    step = max(1, AT_ONCE // columns)
    for begin in range(0, rows, step):
        part = weight[begin : begin + step].float()
        blocks = kind.encode(part.reshape(-1, kind.values), weights.repeat(len(part), 1))
        made[begin : begin + step] = blocks.view(len(part), -1)
    return made
