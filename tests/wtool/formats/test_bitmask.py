"""The bitmask form against compressed-tensors' own packing of masks, and against the layout written with loops."""

import pytest
import torch
from compressed_tensors.config import BitmaskConfig
from compressed_tensors.utils import pack_bitmasks, unpack_bitmasks

from wtool.checkpoint import TensorInfo
from wtool.dtypes import dtype_name
from wtool.formats import bitmask
from wtool.formats.bitmask import is_meant, layout, pack, settings, unpack

SHAPES = [(1, 1), (1, 9), (7, 1), (3, 8), (5, 13), (4, 64)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def sparse(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 10
    return (weight * (torch.rand(shape, generator=generator) > 0.5)).to(dtype)


def by_loops(weight: torch.Tensor) -> tuple[list[float], list[list[int]], list[int]]:
    """Values, bytes and offsets as the header of the format has them."""
    values, octets, offsets = [], [], []
    for row in weight.tolist():
        offsets.append(len(values))
        octets.append([0] * -(-len(row) // 8))
        for j, value in enumerate(row):
            if value != 0:
                values.append(value)
                octets[-1][j // 8] |= 1 << j % 8
    return values, octets, offsets


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for weight in (sparse(shape, dtype), torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)):
        parts = pack(weight)
        values, octets, offsets = by_loops(weight)
        assert parts["compressed"].tolist() == values and parts["compressed"].dtype == dtype
        assert parts["bitmask"].tolist() == octets and parts["row_offsets"].tolist() == offsets
        assert parts["shape"].tolist() == list(shape)
        found = {name: TensorInfo(dtype_name(part.dtype), tuple(part.shape)) for name, part in parts.items()}
        assert found == layout(shape, len(values), dtype_name(dtype)) and tuple(found) == bitmask.SUFFIXES
        assert torch.equal(unpack(parts), weight) and unpack(parts).dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
def test_the_package_reads_our_masks_and_we_read_its(shape: tuple[int, int]) -> None:
    weight = sparse(shape, torch.bfloat16)
    parts, keep = pack(weight), weight != 0
    assert torch.equal(parts["bitmask"], pack_bitmasks(keep))
    assert torch.equal(unpack_bitmasks(parts["bitmask"], list(shape)), keep)


def test_weights_that_are_kept_may_be_zero() -> None:
    # as many are stored as a plan said, whatever their values
    weight = sparse((6, 20), torch.bfloat16)
    keep = torch.rand(6, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    parts = pack(weight, keep)
    assert len(parts["compressed"]) == int(keep.sum()) > int((weight[keep] != 0).sum())
    assert torch.equal(unpack(parts), weight * keep)


def test_what_is_not_finite_is_kept() -> None:
    weight = torch.tensor([[0.0, torch.nan, -torch.inf, 1.0]])
    assert torch.equal(unpack(pack(weight)).isnan(), weight.isnan()) and unpack(pack(weight))[0, 2] == -torch.inf


def test_half_of_the_weights_take_nine_sixteenths_of_the_bytes() -> None:
    sizes = sum(info.nbytes for name, info in layout((576, 1536), 576 * 768, "BF16").items() if name != "shape")
    assert sizes - 576 * 8 == 9 / 16 * 576 * 1536 * 2


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("shape", lambda t: t + 8, "shape says [13, 21], bitmask is [5, 2]"),
        ("bitmask", lambda t: t | 1, "weights, compressed holds"),
        ("compressed", lambda t: t[1:], "weights, compressed holds"),
        ("row_offsets", lambda t: t.flip(0), "row_offsets are not where the rows of bitmask begin"),
    ],
)
def test_contradictions(part: str, change, told: str) -> None:
    parts = pack(sparse((5, 13), torch.float32))
    with pytest.raises(ValueError) as error:
        unpack(parts | {part: change(parts[part])})
    assert told in str(error.value)


def test_settings_are_the_packages() -> None:
    written = settings(0.5, (2, 4))
    read = BitmaskConfig.model_validate(written["sparsity_config"])
    assert (read.global_sparsity, read.sparsity_structure, read.targets) == (0.5, "2:4", ["Linear"])
    assert is_meant(written) and is_meant(settings(0.3))
    assert settings(0.3)["sparsity_config"]["sparsity_structure"] == "unstructured"
    for other in (None, {}, {"sparsity_config": {"format": "dense"}}, written | {"config_groups": {"group_0": {}}}):
        assert not is_meant(other)
