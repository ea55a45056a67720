"""Codes of b bits as a dense stream: code i lies in bits i·b to i·b + b - 1, counted from the lowest bit of word 0.

Words are int32, as they lie on a little-endian machine. Where b does not divide 32 a code may straddle two words;
bits after the last code are zero. Both compressed-tensors and GPTQ lay codes down so (for 3 bits GPTQ's description
speaks of three words with 11, 11 and 10 codes, which comes to the same).
"""

from math import ceil, gcd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_CHUNK = 1 << 22  # codes


def words(count: int, bits: int) -> int:
    """Words that `count` codes take."""
    return ceil(count * bits / 32)


def pack(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Pack along the last dimension.

    codes: uint8 [..., n], each below 2^bits
    bits: 2 to 8

    returns: int32 [..., words(n, bits)]
    """
    import torch

    if codes.dim() == 2 and codes.numel() > 2 * _CHUNK:  # some rows at a time, as it takes memory beside the codes
        packed = torch.empty(len(codes), words(codes.shape[1], bits), dtype=torch.int32, device=codes.device)
        step = max(1, _CHUNK // codes.shape[1])
        for begin in range(0, len(codes), step):
            packed[begin : begin + step] = _packed(codes[begin : begin + step], bits)
        return packed
    return _packed(codes, bits)


def _packed(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    import torch

    count = codes.shape[-1]
    per, size, kind = _unit(bits)
    padded = torch.nn.functional.pad(codes, (0, -count % 32))
    units = padded.unflatten(-1, (padded.shape[-1] // per, per))
    stream = torch.zeros(units.shape[:-1], dtype=kind, device=codes.device)
    for place in range(per):
        stream |= units[..., place].to(kind) << place * bits
    octets = stream.unsqueeze(-1).view(torch.uint8)[..., :size].flatten(-2)
    return octets.contiguous().view(torch.int32)[..., : words(count, bits)].contiguous()


def unpack(packed: "torch.Tensor", bits: int, count: int) -> "torch.Tensor":
    """Undo `pack`.

    packed: int32 [..., words(count, bits)]
    returns: uint8 [..., count]
    """
    import torch

    per, size, kind = _unit(bits)
    octets = packed.contiguous().view(torch.uint8)
    need = ceil(count / per) * size
    octets = torch.nn.functional.pad(octets, (0, need - octets.shape[-1]))  # cuts off what is too much
    octets = octets.unflatten(-1, (need // size, size))
    stream = torch.zeros(octets.shape[:-1], dtype=kind, device=packed.device)
    for place in range(size):
        stream |= octets[..., place].to(kind) << place * 8
    codes = torch.empty(*stream.shape, per, dtype=torch.uint8, device=packed.device)
    for place in range(per):
        codes[..., place] = stream >> place * bits & (1 << bits) - 1
    return codes.flatten(-2)[..., :count].contiguous()


def _unit(bits: int) -> "tuple[int, int, torch.dtype]":
    """The fewest codes that fill whole bytes, those bytes, and a type that holds them."""
    import torch

    per = 8 // gcd(8, bits)
    size = per * bits // 8
    return per, size, torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64


def unsigned(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Codes from 0 up, uint8, of codes from -2^(bits - 1) up, int8."""
    import torch

    return codes.view(torch.uint8) + (1 << bits - 1)  # modulo 256


def signed(codes: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Undo `unsigned`."""
    import torch

    return (codes - (1 << bits - 1)).view(torch.int8)
