"""How what a teacher said of a token lies on disk: for k tokens among V, about 3 k bytes.

    ids     uint16 [tokens, k]      the lower 16 bits of each id
    high    uint8  [tokens, bytes]  the other bits, packed densely; not there where V is at most 65,536
    top     float16 [tokens]        log of the likeliest token's probability, or of the heaviest weight
    falls   uint8  [tokens, k - 1]  how much lower each log is than the one before it
    rest    float16 [tokens]        log of the mass on all other tokens; of a sample, the teacher's entropy

The logs fall along a row, at first steeply and then by little, so code c stands for a fall of 16 (c / 255)³ nats: fine
where falls are small. Each fall is taken from what the codes before it give, so errors do not add up. Beside float16
of every log that is half the bytes, and as exact as bfloat16. A fall of more than 16 nats is cut to 16.
"""

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from wtool.formats.bits import pack, unpack, words

from .signals import Kept, Sampled, TopK

_DEEPEST = 16.0  # nats
_LOW_BITS = 16


def bytes_per_token(k: int, vocabulary: int) -> int:
    """What a token takes on disk."""
    return 2 * k + _high_bytes(k, vocabulary) + 2 + (k - 1) + 2


def encode(said: Kept, vocabulary: int) -> dict[str, Tensor]:
    """Lay what a teacher said down as columns of a file.

    said: with float logs, falling along each row; TopK with a tail
    vocabulary: tokens the teacher chose among, above every id
    """
    logs, rest = (said.log_probs, said.tail) if isinstance(said, TopK) else (said.log_weights, said.entropy)
    assert rest is not None
    top = logs[:, 0].half()
    columns = {"ids": (said.ids & 0xFFFF).to(torch.uint16), "top": top, "rest": rest.half()}
    columns["falls"] = _falls(top.float(), logs.float())
    if bits := _high_bits(vocabulary):
        high = pack((said.ids >> _LOW_BITS).to(torch.uint8), bits)
        columns["high"] = high.view(torch.uint8)[:, : _high_bytes(said.ids.shape[1], vocabulary)]
    return {name: column.contiguous() for name, column in columns.items()}


def decode(columns: Mapping[str, Tensor], mode: str, vocabulary: int) -> Kept:
    """Read columns; the probabilities of a row, with the rest's, or the weights of a sample, add up to 1 again."""
    ids = columns["ids"].to(torch.int64)
    if bits := _high_bits(vocabulary):
        count = ids.shape[1]
        octets = columns["high"]
        whole = torch.nn.functional.pad(octets, (0, 4 * words(count, bits) - octets.shape[1]))
        ids |= unpack(whole.view(torch.int32), bits, count).to(torch.int64) << _LOW_BITS
    logs, rest = _logs(columns["top"].float(), columns["falls"]), columns["rest"].float()
    if mode == "sample":
        return Sampled(ids, logs.log_softmax(-1), rest, vocabulary)
    total = torch.logaddexp(logs.logsumexp(-1), rest)
    return TopK(ids, logs - total[:, None], rest - total, vocabulary)


def _falls(top: Tensor, logs: Tensor) -> Tensor:
    """The codes of all logs but the first, uint8 [tokens, k - 1]."""
    codes = torch.empty(len(logs), logs.shape[1] - 1, dtype=torch.uint8)
    reached, table = top.clone(), _table()
    for place in range(codes.shape[1]):
        fall = (reached - logs[:, place + 1]).clamp(0.0, _DEEPEST)
        code = (255 * (fall / _DEEPEST) ** (1 / 3)).round().to(torch.uint8)
        codes[:, place] = code
        reached -= table[code.long()]
    return codes


def _logs(top: Tensor, falls: Tensor) -> Tensor:
    depths = _table()[falls.long()].cumsum(-1)
    return torch.cat([top[:, None], top[:, None] - depths], -1)


def _table() -> Tensor:
    return _DEEPEST * (torch.arange(256) / 255) ** 3


def _high_bits(vocabulary: int) -> int:
    """Bits of an id above the lower 16."""
    return max(0, (vocabulary - 1).bit_length() - _LOW_BITS)


def _high_bytes(k: int, vocabulary: int) -> int:
    return ceil(k * _high_bits(vocabulary) / 8)
