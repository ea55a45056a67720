"""How GGUF's blocks lie on disk, byte by byte: encoded values in, bytes out.

Format: the block_* structures in llama.cpp's ggml-common.h
(https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h); multi-byte numbers are little-endian.
"""

import torch
from torch import Tensor

from wtool.formats.gguf_super import Super


def _bytes(values: Tensor) -> Tensor:
    """Whole numbers 0 to 255 (float32), as bytes."""
    return values.to(torch.uint8)


def _half_bytes(values: Tensor) -> Tensor:
    """Numbers [blocks, ...] as float16, two bytes a number: [blocks, 2 a number]."""
    return values.to(torch.float16).reshape(len(values), -1).view(torch.uint8)


def _stacked(parts: Tensor, bits: int) -> Tensor:
    """Put [..., k, n] codes of some bits into n bytes, the first in the lowest bits."""
    shifts = torch.arange(parts.shape[-2], device=parts.device).mul(bits)[:, None]
    return (parts.int() << shifts).sum(-2).to(torch.uint8)


# Blocks of 32 values. codes: [blocks, 32]; d and m: [blocks, 1]


def q4_0(codes: Tensor, d: Tensor) -> Tensor:
    """codes from 0 to 15; a value is d (q - 8)"""
    return torch.cat([_half_bytes(d), _nibbles(_bytes(codes))], 1)


def q4_1(codes: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """codes from 0 to 15; a value is d q + m"""
    return torch.cat([_half_bytes(d), _half_bytes(m), _nibbles(_bytes(codes))], 1)


def q5_0(codes: Tensor, d: Tensor) -> Tensor:
    """codes from 0 to 31; a value is d (q - 16)"""
    codes = _bytes(codes)
    return torch.cat([_half_bytes(d), _fifth_bits(codes), _nibbles(codes & 15)], 1)


def q5_1(codes: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """codes from 0 to 31; a value is d q + m"""
    codes = _bytes(codes)
    return torch.cat([_half_bytes(d), _half_bytes(m), _fifth_bits(codes), _nibbles(codes & 15)], 1)


def q8_0(codes: Tensor, d: Tensor) -> Tensor:
    """codes from -127 to 127; a value is d q"""
    return torch.cat([_half_bytes(d), codes.to(torch.int8).view(torch.uint8)], 1)


def _nibbles(codes: Tensor) -> Tensor:
    """The first half of a block in the low four bits, the second in the high ones."""
    return _stacked(codes.view(len(codes), 2, -1), 4)


def _fifth_bits(codes: Tensor) -> Tensor:
    """One bit a value, in four bytes."""
    return _stacked((codes >> 4).view(len(codes), 4, 8, 1), 1).flatten(1)


# Super-blocks of 256 values


def q2_k(made: Super) -> Tensor:
    scales = _bytes(made.scales + 16 * made.minima).flatten(1)
    return torch.cat([scales, _quarters(_bytes(made.codes)), _half_bytes(made.d), _half_bytes(made.e)], 1)


def q3_k(made: Super) -> Tensor:
    codes = _bytes(made.codes + 4)
    third_bits = _stacked((codes >> 2).view(len(codes), 8, 32), 1)
    scales = _bytes(made.scales + 32).flatten(1)
    low = _stacked((scales & 15).view(len(scales), 2, 8), 4)
    high = _stacked((scales >> 4).view(len(scales), 4, 4), 2)
    return torch.cat([third_bits, _quarters(codes & 3), low, high, _half_bytes(made.d)], 1)


def q4_k(made: Super) -> Tensor:
    codes = _bytes(made.codes).view(len(made.codes), 4, 2, 32)
    return torch.cat([_half_bytes(made.d), _half_bytes(made.e), _six_bits(made), _stacked(codes, 4).flatten(1)], 1)


def q5_k(made: Super) -> Tensor:
    codes = _bytes(made.codes)
    fifth_bits = _stacked(codes >> 4, 1)
    low = _stacked((codes & 15).view(len(codes), 4, 2, 32), 4).flatten(1)
    return torch.cat([_half_bytes(made.d), _half_bytes(made.e), _six_bits(made), fifth_bits, low], 1)


def q6_k(made: Super) -> Tensor:
    codes = _bytes(made.codes + 32).view(len(made.codes), 2, 4, 32)
    low = _stacked((codes & 15).view(len(codes), 2, 2, 2, 32).flatten(3), 4).flatten(1)
    high = _stacked(codes >> 4, 2).flatten(1)
    scales = made.scales.to(torch.int8).view(torch.uint8).flatten(1)
    return torch.cat([low, high, scales, _half_bytes(made.d)], 1)


def _quarters(codes: Tensor) -> Tensor:
    """Codes of two bits: 128 values in 32 bytes."""
    return _stacked(codes.view(len(codes), 2, 4, 32), 2).flatten(1)


def _six_bits(made: Super) -> Tensor:
    """Eight scales and eight minima of six bits in twelve bytes: the upper two bits of the last four of each lie
    above the first four."""
    scales, minima = _bytes(made.scales).flatten(1), _bytes(made.minima).flatten(1)
    first = [each[:, :4] | (each[:, 4:] >> 4 << 6) for each in (scales, minima)]
    return torch.cat([*first, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], 1)
