"""FP8 against the definition of its bits, loops in float64, torch's own cast, and compressed-tensors' own writer."""

import math

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme

from wtool.dtypes import TensorInfo, dtype_name
from wtool.formats import fp8
from wtool.formats.fp8 import SCHEMES, Blocks, decode, encode, largest_in_blocks, relative_error

WHOLE, ROWS = Blocks(-1, -1), Blocks(1, -1)
BLOCKS = [WHOLE, ROWS, Blocks(2, 3), Blocks(1, 4), Blocks(128, 128)]
SHAPES = [(1, 1), (1, 7), (5, 1), (4, 6), (5, 7), (3, 12), (0, 4), (4, 0)]


def value(code: int) -> float:
    """What 8 bits stand for: a sign, an exponent of 4 bits less 7, a mantissa of 3."""
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


POSITIVE = [value(code) for code in range(127)]


def nearest(number: float) -> float:
    """The nearest value, of two as near the one whose last bit is 0; the largest for all beyond."""
    magnitude = min(abs(number), POSITIVE[-1])
    code = min(range(127), key=lambda i: (abs(POSITIVE[i] - magnitude), i & 1))
    return math.copysign(POSITIVE[code], number)


def numbers() -> list[float]:
    """Every value, every middle between two, numbers on either side of it, and some beyond the range."""
    middles = [(low + high) / 2 for low, high in zip(POSITIVE, POSITIVE[1:], strict=False)]
    beside = [middle * (1 + off) for middle in middles for off in (-1e-6, 1e-6)]
    found = [*POSITIVE, *middles, *beside, 2.0**-10, 2.0**-11, 449.0, 464.0, 465.0, 480.0, 1e9]
    return found + [-number for number in found]


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if shape[0] > 2:
        weight[1], weight[2] = weight[1].abs(), 0
    return weight.to(dtype)


def test_every_number_goes_to_the_nearest_code_and_none_to_nan() -> None:
    weight = torch.tensor([numbers()])
    found = encode(weight, torch.ones(1, 1), WHOLE)
    assert found.float().tolist() == [[nearest(number) for number in weight[0].tolist()]]
    inside = weight.abs() <= 448
    assert torch.equal(found[inside].view(torch.uint8), weight[inside].to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_what_loops_say(monkeypatch, shape: tuple[int, int], blocks: Blocks, dtype: torch.dtype) -> None:
    monkeypatch.setattr(fp8, "_CHUNK", 8)  # so that matrices are worked on in pieces
    weight = matrix(*shape, dtype=dtype)
    height, width = (
        whole if part == -1 else part for part, whole in zip((blocks.rows, blocks.columns), shape, strict=True)
    )
    count = [math.ceil(whole / max(part, 1)) for part, whole in zip((height, width), shape, strict=True)]
    largest = [[0.0] * count[1] for _ in range(count[0])]
    for r in range(shape[0]):
        for i in range(shape[1]):
            place = largest[r // height]
            place[i // width] = max(place[i // width], abs(float(weight[r, i])))
    found = largest_in_blocks(weight, blocks)
    assert list(found.shape) == count == list(blocks.count(shape)) and found.tolist() == largest
    scales = torch.rand(count, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-3
    before = weight.clone()
    codes = encode(weight, scales, blocks)
    assert torch.equal(weight, before)
    values = decode(codes, scales, blocks)
    lost = 0.0
    for r in range(shape[0]):
        for i in range(shape[1]):
            scale = float(scales[r // height, i // width])
            ratio = float(torch.tensor(float(weight[r, i])) / torch.tensor(scale))  # one division in float32
            assert float(codes[r, i]) == nearest(ratio)
            assert float(values[r, i]) == float(torch.tensor(nearest(ratio) * scale))
            lost += (float(values[r, i]) - float(weight[r, i])) ** 2
    whole = float(weight.double().square().sum())
    assert relative_error(weight, codes, scales, blocks) == pytest.approx(
        (lost / whole) ** 0.5 if whole else 0, rel=1e-5
    )


def test_experts_in_one_tensor_are_decoded_each_by_its_scales() -> None:
    codes = matrix(6, 5).reshape(2, 3, 5).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 3)
    both = decode(codes, scales, Blocks(2, 2))
    assert torch.equal(both, torch.stack([decode(codes[e], scales[e], Blocks(2, 2)) for e in range(2)]))


@pytest.mark.parametrize(("name", "preset"), [("fp8-dynamic", "FP8_DYNAMIC"), ("fp8-block", "FP8_BLOCK")])
def test_settings_are_the_packages_own_scheme(name: str, preset: str) -> None:
    settings = fp8.settings("compressed-tensors", SCHEMES[name], ["lm_head"])
    group = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    assert isinstance(group, QuantizationScheme)
    wanted = preset_name_to_scheme(preset, ["Linear"])
    assert group.weights == wanted.weights
    assert group.input_activations is not None and wanted.input_activations is not None
    ours, theirs = group.input_activations.model_dump(), wanted.input_activations.model_dump()
    assert {**ours, "observer": None} == {**theirs, "observer": None}
    assert settings["format"] == group.format == "float-quantized" and settings["ignore"] == ["lm_head"]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(256, 128), (384, 256)])
def test_byte_for_byte_what_the_package_writes_and_reads(name: str, shape: tuple[int, int]) -> None:
    scheme, weight = SCHEMES[name], matrix(*shape)
    scales = largest_in_blocks(weight, scheme.blocks).clamp(min=1e-6) / 448
    infos = fp8.layout("compressed-tensors", shape, scheme.blocks, "F32")
    stored = scales.reshape(infos["weight_scale"].shape)
    theirs = QuantizationConfig.model_validate(fp8.settings("compressed-tensors", scheme, []))
    group = theirs.config_groups["group_0"]
    assert isinstance(group, QuantizationScheme)
    packed = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": stored}, group)
    assert {key: TensorInfo(dtype_name(part.dtype), tuple(part.shape)) for key, part in packed.items()} == infos
    codes = encode(weight, scales, scheme.blocks)
    assert torch.equal(packed["weight"].view(torch.uint8), codes.view(torch.uint8))
    read = FloatQuantizationCompressor.decompress({"weight": codes, "weight_scale": stored}, group)["weight"]
    assert torch.equal(read, decode(codes, scales, scheme.blocks))


def test_the_other_layout() -> None:
    assert fp8.layout("fp8", (200, 256), Blocks(128, 128), "F32")["weight_scale_inv"] == TensorInfo("F32", (2, 2))
    assert fp8.layout("fp8", (200, 256), WHOLE, "F32")["weight_scale_inv"] == TensorInfo("F32", ())
    assert fp8.unfit("fp8", (256, 64), Blocks(128, 128)) is None
    assert "do not divide its 200, as fp8 asks" in (fp8.unfit("fp8", (200, 256), Blocks(128, 128)) or "")
    assert fp8.unfit("compressed-tensors", (200, 256), Blocks(128, 128)) is None
    assert [fp8.scale_dtype("fp8", "BF16"), fp8.scale_dtype("compressed-tensors", "BF16")] == ["F32", "BF16"]
