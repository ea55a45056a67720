"""Bits against one long Python integer, and against compressed-tensors' own packing."""

import sys

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from wtool.formats.bits import pack, signed, unpack, unsigned, words

BITS = range(2, 9)
COUNTS = (1, 2, 7, 31, 32, 33, 100)


def codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_one_long_number(bits: int, count: int) -> None:
    row = codes(bits, count)
    number = sum(code << bits * place for place, code in enumerate(row.tolist()))
    length = 4 * words(count, bits)
    assert 8 * length - 32 < count * bits <= 8 * length  # no word more than needed
    assert pack(row, bits).numpy().tobytes() == number.to_bytes(length, "little")
    assert sys.byteorder == "little"
    assert unpack(pack(row, bits), bits, count).tolist() == row.tolist()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_as_compressed_tensors_packs(bits: int, count: int) -> None:
    matrix = codes(bits, 5, count)
    packed = pack(matrix, bits)
    assert torch.equal(packed, pack_to_int32(signed(matrix, bits), bits))
    assert torch.equal(pack(matrix, bits).T, pack_to_int32(signed(matrix.T, bits).contiguous(), bits, packed_dim=0))
    theirs = unpack_from_int32(packed, bits, matrix.shape)
    assert torch.equal(signed(unpack(packed, bits, count), bits), theirs)


@pytest.mark.parametrize("bits", BITS)
def test_any_dimensions_and_strides(bits: int) -> None:
    cube = codes(bits, 40, 2, 3).permute(1, 2, 0)
    packed = pack(cube, bits)
    assert packed.shape == (2, 3, words(40, bits)) and packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, 40), cube)
    strided = packed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous() and torch.equal(unpack(strided, bits, 40), cube)


@pytest.mark.parametrize("bits", BITS)
def test_codes_from_zero_up(bits: int) -> None:
    half = 1 << bits - 1
    every = torch.arange(-half, half, dtype=torch.int8)
    assert unsigned(every, bits).tolist() == list(range(2 * half))
    assert torch.equal(signed(unsigned(every, bits), bits), every)
