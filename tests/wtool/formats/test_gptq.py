"""The GPTQ format against its description, field by field, and against what its tools are known to write.

The tools themselves (GPTQModel, AutoGPTQ) need environments of their own: benchmarks/interop.
"""

import re
from typing import Any

import pytest
import torch
from quantized_models import rounded

from wtool.checkpoint import TensorInfo
from wtool.dtypes import dtype_name
from wtool.errors import QuantizedInput
from wtool.formats import FORMATS, Scheme, reader
from wtool.grid import Grid, Quantized

V1, V2 = FORMATS["gptq"], FORMATS["gptq_v2"]
BITS = (2, 3, 4, 8)


def held(shape: tuple[int, int], scheme: Scheme, seed: int = 0) -> Quantized:
    """Any codes, any zeros, scales of either sign."""
    grid, generator = scheme.grid, torch.Generator().manual_seed(seed)
    span = {"low": grid.lowest, "high": grid.highest + 1, "dtype": torch.int8, "generator": generator}
    groups, index = (shape[0], grid.groups(shape[1])), grid.group_index(shape[1])
    return Quantized(
        codes=torch.randint(size=shape, **span),
        scales=torch.randn(groups, generator=generator).half(),
        zeros=None if grid.symmetric else torch.randint(size=groups, **span),
        group_index=index[torch.randperm(shape[1], generator=generator)] if scheme.ordered else index,
    )


def equal(a: Quantized, b: Quantized) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x is y for x, y in pairs)


def field(words: list[int], bits: int, place: int) -> int:
    """Code `place` of a run of words: for 3 bits as AutoGPTQ describes it, 32 codes in three words."""
    words = [word & 0xFFFFFFFF for word in words]
    if bits != 3:
        per = 32 // bits
        return words[place // per] >> bits * (place % per) & (1 << bits) - 1
    (first, second, third), place = words[place // 32 * 3 : place // 32 * 3 + 3], place % 32
    if place < 10:
        return first >> 3 * place & 7
    if place == 10:
        return first >> 30 | (second & 1) << 2
    if place < 21:
        return second >> 3 * (place - 11) + 1 & 7
    if place == 21:
        return second >> 31 | (third & 3) << 1
    return third >> 3 * (place - 22) + 2 & 7


@pytest.mark.parametrize("format", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", BITS)
def test_the_definition(bits: int, format: Any) -> None:
    """W[r, i] = scales[g_idx[i], r] * (code - zero), with zeros less one in version 1."""
    scheme = Scheme(Grid(bits, 48), ordered=True)
    ours = held((32, 64), scheme)
    stored = {suffix: part.tolist() for suffix, part in format.encode(ours, scheme).items()}
    columns = [list(column) for column in zip(*stored["qweight"], strict=True)]
    one = 1 if format is V1 else 0
    values = ours.values().double()
    for r in range(32):
        for i in range(64):
            g = stored["g_idx"][i]
            code, zero = field(columns[r], bits, i), field(stored["qzeros"][g], bits, r) + one
            assert stored["scales"][g][r] * (code - zero) == values[r, i]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("size", [32, -1, 40])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("format", "symmetric"), [(V1, True), (V2, True), (V2, False)])
def test_there_and_back(format: Any, symmetric: bool, bits: int, size: int, ordered: bool) -> None:
    scheme, shape = Scheme(Grid(bits, size, symmetric), ordered), (64, 96)
    assert format.unfit(shape, scheme) is None
    ours = held(shape, scheme)
    stored = format.encode(ours, scheme)
    infos = {suffix: TensorInfo(dtype_name(part.dtype), tuple(part.shape)) for suffix, part in stored.items()}
    assert format.layout(shape, scheme, format.scale_dtype("BF16")) == infos
    assert all(part.is_contiguous() for part in stored.values())
    assert equal(format.decode(stored, scheme, shape), ours)
    without = {suffix: part for suffix, part in stored.items() if suffix != "g_idx"}
    if not ordered:  # the first tools did not write it
        assert equal(format.decode(without, scheme, shape), ours)


@pytest.mark.parametrize(
    ("bits", "one", "two"),
    [
        (2, 0x55555555, 0xAAAAAAAA),
        (3, 0xDB6DB6DB, 0x24924924),
        (4, 0x77777777, 0x88888888),
        (8, 0x7F7F7F7F, 0x80808080),
    ],
)
def test_the_words_of_symmetric_zeros(bits: int, one: int, two: int) -> None:
    """The constants that one meets in such files (for 3 bits, the first of three words)."""
    scheme = Scheme(Grid(bits, -1))
    ours = rounded(torch.randn(32, 32), scheme)
    assert int(V1.encode(ours, scheme)["qzeros"][0, 0]) & 0xFFFFFFFF == one
    assert int(V2.encode(ours, scheme)["qzeros"][0, 0]) & 0xFFFFFFFF == two


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_1_as_gptqmodel_and_autoround_write_it(bits: int) -> None:
    """They take one from every code of a word at once; a zero of 0 borrows from its neighbour."""
    scheme, shape = Scheme(Grid(bits, -1, symmetric=False)), (32, 32)
    ours = held(shape, scheme)
    assert ours.zeros is not None
    ours.zeros[:5] = scheme.grid.lowest
    stored = V2.encode(ours, scheme)
    ones = sum(1 << place for place in range(0, 32, bits))
    assert equal(V1.decode(stored | {"qzeros": stored["qzeros"] - ones}, scheme, shape), ours)


def test_version_1_as_autogptq_writes_it() -> None:
    """One less field by field, where no zero is 0."""
    for bits in BITS:
        scheme, shape = Scheme(Grid(bits, -1, symmetric=False)), (32, 32)
        ours = held(shape, scheme)
        assert ours.zeros is not None
        ours.zeros.clamp_(min=scheme.grid.lowest + 1)
        assert equal(V1.decode(V1.encode(ours, scheme), scheme, shape), ours)


def test_the_zeros_of_a_file_count_and_not_its_settings() -> None:
    scheme, shape = Scheme(Grid(4, 32, symmetric=False)), (32, 32)
    ours = held(shape, scheme)
    assert equal(V2.decode(V2.encode(ours, scheme), Scheme(Grid(4, 32)), shape), ours)


def test_groups_that_are_not_there() -> None:
    scheme, shape = Scheme(Grid(4, 32)), (32, 64)
    stored = V1.encode(held(shape, scheme), scheme)
    for wrong in (2, -1):
        stored["g_idx"][5] = wrong
        with pytest.raises(ValueError, match="g_idx names groups outside of 0 to 1"):
            V1.decode(stored, scheme, shape)


def test_what_does_not_fit() -> None:
    assert V1.scale_dtype("BF16") == "F16"
    assert V1.unfit((32, 64), Scheme(Grid(4, 40), ordered=True)) is None
    assert V1.unfit((32, 64), Scheme(Grid(4, 32, symmetric=False))) == (
        "gptq is safe for symmetric grids only: take gptq_v2, or compressed-tensors"
    )
    assert V2.unfit((32, 64), Scheme(Grid(4, 32, symmetric=False))) is None
    assert V2.unfit((32, 64), Scheme(Grid(5, 32))) == (
        "gptq_v2 has codes of 2, 3, 4 or 8 bits, not 5: take one, or compressed-tensors"
    )
    assert V1.unfit((36, 64), Scheme(Grid(4, 32))) == (
        "its 36 outputs at 4 bits fill no whole number of 32-bit words, as gptq asks: take compressed-tensors"
    )
    assert "its 80 inputs at 3 bits" in str(V1.unfit((32, 80), Scheme(Grid(3, 32))))


# Settings

W4, W8, W3 = Scheme(Grid(4, 64)), Scheme(Grid(8, -1), ordered=True), Scheme(Grid(3, 32, symmetric=False))


def test_settings_of_one_kind() -> None:
    settings = V1.settings({"model.layers.0.mlp.up_proj": W4, "model.layers.0.mlp.down_proj": W4}, [])
    assert {key: value for key, value in settings.items() if key != "meta"} == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    assert V1.files(settings) == {"quantize_config.json": settings}
    assert V2.settings({"x": W4}, [])["checkpoint_format"] == "gptq_v2"
    assert V2.settings({"x": W4, "lm_head": W4}, [])["lm_head"] is True


def test_settings_of_several_kinds() -> None:
    wanted = {f"model.layers.{i}.{name}": W4 for i in range(12) for name in ("q_proj", "k_proj", "up_proj")}
    wanted |= {"model.layers.1.q_proj": W8, "model.layers.1.k_proj": W8, "model.layers.3.up_proj": W3}
    plain = ["lm_head", "model.layers.1.gate"]
    settings = V2.settings(wanted, plain)
    read = V2.schemes(settings)
    assert {layer: read(layer) for layer in wanted} == wanted

    def looked_up(layer: str) -> Any:
        """What a runtime does: the first pattern that fits, from the start of the name."""
        return next((rule for rule in settings["dynamic"] if re.match(rule[2:], layer)), None)

    assert all(looked_up(layer).startswith("-:") for layer in plain)
    assert looked_up("model.layers.11.q_proj") is None and looked_up("model.layers.1.gate_proj") is None
    assert settings["dynamic"][looked_up("model.layers.1.qkv_proj")] == {
        "bits": 8,
        "group_size": -1,
        "sym": True,
        "desc_act": True,
    }


def test_rules_as_tools_write_them() -> None:
    usual = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    dynamic = {"-:.*gate$": {}, r".*\.mlp\..*": {"bits": 8}, r"+:.*\.1\..*": {"bits": 2, "group_size": 32}}
    read = V1.schemes({**usual, "dynamic": dynamic, "sym": True})
    assert read("model.layers.1.mlp.up_proj") == Scheme(Grid(8, 128))  # the first that fits
    assert read("model.layers.1.self_attn.q_proj") == Scheme(Grid(2, 32))
    assert read("model.layers.0.self_attn.q_proj") == Scheme(Grid(4, 128))
    assert V1.schemes({**usual, "dynamic": None, "group_size": -1})("x") == Scheme(Grid(4, -1))


def test_autoround() -> None:
    settings = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "data_type": "int",
        "group_size": 64,
        "sym": True,
        "extra_config": {"model.layers.1.o_proj": {"bits": 8}, r".*layers\.2\..*": {"group_size": 32}},
    }
    name, format, read = reader(settings)
    assert name == "gptq" and format is V1
    assert read("model.layers.1.o_proj") == Scheme(Grid(8, 64))
    assert read("model.layers.11.o_proj") == Scheme(Grid(4, 64))
    assert read("model.layers.2.o_proj") == Scheme(Grid(4, 32))
    with pytest.raises(QuantizedInput, match="^auto_round:auto_awq$"):
        reader({**settings, "packing_format": "auto_round:auto_awq"})
    with pytest.raises(QuantizedInput, match="^auto_round:auto_gptq$"):
        reader({**settings, "data_type": "mx_fp"})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "gptq"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"format": "gptq_v2"}, "gptq_v2"),
    ],
)
def test_versions(change: dict[str, Any], name: str) -> None:
    assert reader({"quant_method": "gptq", "bits": 4, "group_size": 64, **change})[0] == name


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"is_marlin_format": True}, "marlin"),
        ({"bits": 5}, "codes of 5 bits"),
        ({"pack_dtype": "int16"}, "packed in words of int16"),
        ({"quant_method": "aqlm"}, "aqlm"),
    ],
)
def test_other_varieties_are_not_read(change: dict[str, Any], clause: str) -> None:
    with pytest.raises(QuantizedInput, match=f"^{clause}$"):
        reader({"quant_method": "gptq", "bits": 4, "group_size": 64, **change})


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"bits": None}, "'bits' is None, not of type int"),
        ({"sym": "yes"}, "'sym' is 'yes', not of type bool"),
        ({"group_size": 0}, "groups of 0 are none"),
        ({"dynamic": ["q"]}, "'dynamic' is ['q'], not of type dict"),
        ({"dynamic": {"+:q": 8}}, "'+:q' is 8, not of type dict"),
        ({"dynamic": {"+:*q": {}}}, "'*q' is no pattern: nothing to repeat"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], clause: str) -> None:
    with pytest.raises(ValueError, match=re.escape(clause)):
        V1.schemes({"quant_method": "gptq", "bits": 4, "group_size": 64, **change})
