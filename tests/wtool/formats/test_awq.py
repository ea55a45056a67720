"""The AWQ format against its description, field by field. GPTQModel reads it in benchmarks/interop."""

from pathlib import Path

import pytest
import torch
from quantized_models import rounded, write_quantized
from tiny_models import llama, saved

from wtool.checkpoint import TensorInfo, open_checkpoint
from wtool.dtypes import dtype_name
from wtool.errors import QuantizedInput
from wtool.formats import FORMATS, Scheme, reader
from wtool.grid import Grid, Quantized

AWQ = FORMATS["awq"]
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def held(shape: tuple[int, int], scheme: Scheme) -> Quantized:
    """Any codes, zeros and scales."""
    generator = torch.Generator().manual_seed(0)
    groups, index = (shape[0], scheme.grid.groups(shape[1])), scheme.grid.group_index(shape[1])
    codes = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
    zeros = torch.randint(-8, 8, groups, dtype=torch.int8, generator=generator)
    scales = torch.randn(groups, generator=generator).half()
    return Quantized(codes, scales, None if scheme.grid.symmetric else zeros, index)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_definition(symmetric: bool) -> None:
    """W[r, i] = scales[g, r] * (code - zero), place k of word w holding output 8 w + ORDER[k]."""
    scheme = Scheme(Grid(4, 16, symmetric))
    ours = held((24, 32), scheme)
    stored = {suffix: part.tolist() for suffix, part in AWQ.encode(ours, scheme).items()}
    values = ours.values().double()
    for r in range(24):
        place = 4 * ORDER.index(r % 8)
        for i in range(32):
            code = (stored["qweight"][i][r // 8] & 0xFFFFFFFF) >> place & 15
            zero = (stored["qzeros"][i // 16][r // 8] & 0xFFFFFFFF) >> place & 15
            assert stored["scales"][i // 16][r] * (code - zero) == values[r, i]


@pytest.mark.parametrize("size", [16, -1, 48])
@pytest.mark.parametrize("symmetric", [False, True])
def test_there_and_back(size: int, symmetric: bool) -> None:
    scheme, shape = Scheme(Grid(4, size, symmetric)), (8, 48)
    assert AWQ.unfit(shape, scheme) is None
    ours = held(shape, scheme)
    stored = AWQ.encode(ours, scheme)
    infos = {suffix: TensorInfo(dtype_name(part.dtype), tuple(part.shape)) for suffix, part in stored.items()}
    assert AWQ.layout(shape, scheme, AWQ.scale_dtype("BF16")) == infos
    assert all(part.is_contiguous() for part in stored.values())
    assert AWQ.shape(infos, scheme, lambda suffix: None) == shape
    back = AWQ.decode(stored, scheme, shape)
    assert torch.equal(back.codes, ours.codes) and torch.equal(back.scales, ours.scales)
    assert torch.equal(back.values(), ours.values()) and (back.zeros is None) == symmetric


@pytest.mark.parametrize(
    ("shape", "scheme", "reason"),
    [
        ((8, 32), Scheme(Grid(3, 16)), "awq has codes of 4 bits, not 3"),
        ((12, 32), Scheme(Grid(4, 16)), "its 12 outputs are no multiple of 8"),
        ((8, 40), Scheme(Grid(4, 16)), "groups of 16 do not divide its 40 inputs"),
        ((8, 32), Scheme(Grid(4, 16), ordered=True), "no groups ordered by activation"),
    ],
)
def test_what_does_not_fit_is_told(shape: tuple[int, int], scheme: Scheme, reason: str) -> None:
    assert reason in str(AWQ.unfit(shape, scheme))


def test_settings_are_read_again_and_those_of_others_too() -> None:
    settings = AWQ.settings({"a": Scheme(Grid(4, 32, symmetric=False))}, ["lm_head"])
    assert settings["modules_to_not_convert"] == ["lm_head"] and settings["zero_point"] is True
    name, format, schemes = reader(settings)
    assert (name, format, schemes("a")) == ("awq", AWQ, Scheme(Grid(4, 32, symmetric=False)))
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}
    assert reader(old)[2]("a").grid.group_size == 128
    for other in ({"version": "gemv"}, {"bits": 3}):
        with pytest.raises(QuantizedInput, match="version|codes of"):
            reader(settings | other)


def test_a_checkpoint_is_read_as_plain_weights(tmp_path: Path) -> None:
    model = saved(llama(hidden_size=64, intermediate_size=96), tmp_path / "model")
    scheme = Scheme(Grid(4, 32, symmetric=False))
    packed = write_quantized(model, tmp_path / "awq", "awq", lambda layer: scheme)
    read = open_checkpoint(str(tmp_path / "awq"))
    assert read.quantization == "awq 4 bits, groups of 32, asymmetric"
    for layer, quantized in packed.items():
        assert torch.equal(read.read(f"{layer}.weight"), quantized.values())
    weight = open_checkpoint(str(model)).read("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(rounded(weight, scheme).values(), read.read("model.layers.0.mlp.up_proj.weight"))
