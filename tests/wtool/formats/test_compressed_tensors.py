"""The compressed-tensors format against the package itself: its compressor, its settings, and transformers' loading."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from quantized_models import rounded, write_quantized
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM

from wtool.checkpoint import TensorInfo, open_checkpoint
from wtool.dtypes import dtype_name
from wtool.errors import QuantizedInput
from wtool.formats import FORMATS, Scheme
from wtool.grid import Grid, Quantized
from wtool.loading import load_model, quiet

FORMAT = FORMATS["compressed-tensors"]
GRIDS = [Grid(bits, size, symmetric) for bits in range(2, 9) for size in (32, -1) for symmetric in (True, False)]
SHAPES = [(5, 64), (1, 32), (33, 96)]


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    """Weights of either sign, with rows of one sign, a row of zeros and an outlier."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[0].abs_()
    weight[0, 0] = 50
    if shape[0] > 3:
        weight[1] = -weight[1].abs()
        weight[2] = 0
    return weight


def theirs(scheme: Scheme) -> QuantizationScheme:
    """The package's own reading of the settings that are written."""
    settings = FORMAT.settings({"layer": scheme}, [])
    return QuantizationConfig.model_validate(settings).config_groups["group_0"]  # pyright: ignore[reportReturnType]


def compressed(held: Quantized, scheme: Scheme) -> dict[str, torch.Tensor]:
    """What the package's compressor makes of the matrix that `held` stands for."""
    state = {"weight": held.values(), "weight_scale": held.scales}
    if held.zeros is not None:
        state["weight_zero_point"] = held.zeros
    return PackedQuantizationCompressor.compress(state, theirs(scheme))


def same(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    assert set(ours) == set(others)
    return all(
        ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape and torch.equal(ours[name], tensor)
        for name, tensor in others.items()
    )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_byte_for_byte_what_the_package_writes_and_reads(grid: Grid, dtype: str) -> None:
    for shape in SHAPES:
        scheme = Scheme(grid)
        held = rounded(matrix(*shape), scheme, dtype)
        assert grid.symmetric == (held.zeros is None) == bool((held.scales < 0).any())
        stored = FORMAT.encode(held, scheme)
        assert same(stored, compressed(held, scheme))
        # code times scale takes 19 bits at most, so it is rounded once, whether to its type or to float32 before
        read = PackedQuantizationCompressor.decompress(dict(stored), theirs(scheme))["weight"]
        assert torch.equal(FORMAT.decode(stored, scheme, shape).values().to(held.scales.dtype), read)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("grid", [*GRIDS, Grid(4, 24), Grid(3, 24, False)], ids=str)
def test_there_and_back(grid: Grid, ordered: bool) -> None:
    for shape in ((1, 1), (7, 45), (33, 96)):
        generator = torch.Generator().manual_seed(1)
        scheme, groups = Scheme(grid, ordered), grid.groups(shape[1])
        span = {"low": grid.lowest, "high": grid.highest + 1, "dtype": torch.int8, "generator": generator}
        index = grid.group_index(shape[1])
        held = Quantized(
            codes=torch.randint(size=shape, **span),
            scales=torch.randn(shape[0], groups, generator=generator).bfloat16(),
            zeros=None if grid.symmetric else torch.randint(size=(shape[0], groups), **span),
            group_index=index.flip(0) if ordered else index,
        )
        stored = FORMAT.encode(held, scheme)
        infos = {suffix: TensorInfo(dtype_name(part.dtype), tuple(part.shape)) for suffix, part in stored.items()}
        assert FORMAT.layout(shape, scheme, "BF16") == infos
        assert all(part.is_contiguous() for part in stored.values())
        again = FORMAT.decode(stored, scheme, shape)
        assert all(
            torch.equal(a, b) if isinstance(b, torch.Tensor) else a is b
            for a, b in zip(vars(again).values(), vars(held).values(), strict=True)
        )


def test_the_type_of_scales() -> None:
    assert [FORMAT.scale_dtype(dtype) for dtype in ("F16", "BF16", "F32", "F64")] == ["F16", "BF16", "F32", "F32"]


# Settings

LAYERS = [name for name, module in llama().named_modules() if isinstance(module, torch.nn.Linear)]
W4, W8, W3 = Scheme(Grid(4, 32)), Scheme(Grid(8, -1)), Scheme(Grid(3, 16, symmetric=False))


def attached(settings: dict[str, Any]) -> dict[str, Scheme]:
    """The scheme that the package gives each linear layer of a tiny llama."""
    with torch.device("meta"):
        model = llama()
    apply_quantization_config(model, QuantizationConfig.model_validate(settings), show_progress=False)
    found = {}
    for name, module in model.named_modules():
        given = getattr(module, "quantization_scheme", None)
        if given is not None and given.weights is not None:
            size = -1 if given.weights.strategy == "channel" else given.weights.group_size
            found[name] = Scheme(Grid(given.weights.num_bits, size, given.weights.symmetric))
    return found


@pytest.mark.parametrize(
    "wanted",
    [
        {layer: W4 for layer in LAYERS if layer != "lm_head"},
        {layer: W8 if "down" in layer else W4 for layer in LAYERS if layer != "lm_head"},
        {
            layer: {"q": W3, "k": W3, "v": W3, "o": W8}.get(layer[-6], W4)
            for layer in LAYERS
            if "layers.1.mlp" not in layer
        },
    ],
    ids=["one", "two", "three, and some plain"],
)
def test_settings_mean_the_same_to_the_package(wanted: dict[str, Scheme]) -> None:
    settings = FORMAT.settings(wanted, [layer for layer in LAYERS if layer not in wanted])
    assert attached(settings) == wanted
    again = json.loads(json.dumps(settings))
    read = FORMAT.schemes(again)
    assert {layer: read(layer) for layer in wanted} == wanted
    assert settings["format"] == "pack-quantized" and settings["quant_method"] == "compressed-tensors"


def group(bits: int, *targets: str, **more: Any) -> dict[str, Any]:
    return {"targets": list(targets), "weights": {"num_bits": bits, "group_size": 8, "symmetric": True, **more}}


@pytest.mark.parametrize(
    "groups",
    [
        [group(4, "Linear"), group(8, "re:.*down_proj$")],
        [group(8, "re:.*down_proj$", "re:.*layers.0.*"), group(4, "re:.*layers.1.*", "model.layers.0.mlp.down_proj")],
        [group(4, "re:.*self_attn.*"), group(2, "re:.*q_proj"), group(3, "Linear")],
    ],
)
def test_targets_are_matched_as_the_package_does(groups: list[dict[str, Any]]) -> None:
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": entry for i, entry in enumerate(groups)},
        "ignore": ["re:.*lm_head"],
    }
    wanted = attached(settings)
    read = FORMAT.schemes(settings)
    assert len({str(scheme) for scheme in wanted.values()}) > 1
    assert {layer: read(layer) for layer in wanted} == wanted


def test_what_is_left_out_of_settings_is_as_the_package_has_it() -> None:
    read = FORMAT.schemes({"config_groups": {"a": group(4, "Linear", actorder="weight")}, "format": "pack-quantized"})
    assert read("x") == Scheme(Grid(4, 8))
    old = FORMAT.schemes({"config_groups": {"a": group(4, "Linear", actorder="group")}, "format": "pack-quantized"})
    assert old("x") == Scheme(Grid(4, 8), ordered=True)
    channel = group(4, "Linear", group_size=-1)
    assert FORMAT.schemes({"config_groups": {"a": channel}, "format": "pack-quantized"})("x").grid.group_size == -1


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"format": "float-quantized"}, "weights as float-quantized"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "a preset in place of a group"),
        ({"config_groups": {"a": group(4, "Linear", type="float")}}, "weights as pack-quantized"),
        ({"config_groups": {"a": group(4, "Linear", strategy="block")}}, "scales by block"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "its transform_config says more than"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "its kv_cache_scheme says more than"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse as sparse-24-bitmask"),
    ],
)
def test_other_varieties_are_not_read(change: dict[str, Any], clause: str) -> None:
    settings = {"config_groups": {"a": group(4, "Linear")}, "format": "pack-quantized", **change}
    with pytest.raises(QuantizedInput, match=re.escape(clause)):
        FORMAT.schemes(settings)


@pytest.mark.parametrize(
    ("groups", "clause"),
    [
        (None, "'config_groups' is None, not of type dict"),
        ({"a": {"targets": ["Linear"]}}, "'weights' is None"),
        ({"a": group(4, "Linear", num_bits="4")}, "'num_bits' is '4', not of type int"),
        ({"a": group(9, "Linear")}, "9 bits in groups of 8 are none"),
        ({"a": group(4, "Linear", group_size=-8)}, "4 bits in groups of -8 are none"),
        ({"a": {**group(4), "targets": "Linear"}}, "'targets' is 'Linear', not a list"),
        ({"a": group(4, "re:*down_proj")}, "'*down_proj' is no pattern: nothing to repeat"),
    ],
)
def test_settings_that_make_no_sense(groups: Any, clause: str) -> None:
    with pytest.raises(ValueError, match=re.escape(clause)):
        FORMAT.schemes({"config_groups": groups, "format": "pack-quantized"})


def test_a_layer_that_no_group_covers() -> None:
    read = FORMAT.schemes({"config_groups": {"a": group(4, "q"), "b": group(8, "k")}, "format": "pack-quantized"})
    with pytest.raises(ValueError, match="no config group has 'v' among its targets"):
        read("v")
    alone = FORMAT.schemes({"config_groups": {"a": group(4, "Conv1D")}, "format": "pack-quantized"})
    assert alone("v").grid.bits == 4


def test_what_does_not_fit() -> None:
    assert FORMAT.unfit((3, 128), Scheme(Grid(5, 64, False))) is None
    assert FORMAT.unfit((3, 100), Scheme(Grid(4, -1))) is None
    told = FORMAT.unfit((3, 96), Scheme(Grid(4, 64)))
    assert told == "groups of 64 do not divide its 96 inputs, as compressed-tensors asks: take groups of 32"
    assert "take whole rows (-1)" in str(FORMAT.unfit((3, 100), Scheme(Grid(4, 64))))
    assert "has no groups ordered by activation" in str(FORMAT.unfit((3, 128), Scheme(Grid(4, 64), ordered=True)))
    with pytest.raises(ValueError, match="actorder='group' has been removed"):  # the package's own word on it
        theirs(Scheme(Grid(4, 64), ordered=True))
    with pytest.raises(ValueError, match="must be divisble"):
        compressed(rounded(matrix(3, 96), Scheme(Grid(4, 64))), Scheme(Grid(4, 64)))


# transformers


@pytest.mark.parametrize(
    ("scheme_of", "dtype"),
    [
        (lambda layer: Scheme(Grid(4, 32)), "F32"),
        (lambda layer: Scheme(Grid(4, 64)), "BF16"),
        (lambda layer: Scheme(Grid(3, 32, symmetric=False)), "F32"),
        (lambda layer: None if ".0." in layer else Scheme(Grid(4, 32) if "mlp" in layer else Grid(8, -1)), "F16"),
    ],
    ids=["4 bits", "bf16", "3 bits asymmetric", "mixed"],
)
def test_transformers_loads_it(tmp_path: Path, scheme_of: Any, dtype: str) -> None:
    """Both multiply codes by scales in float32, so weights are equal, and logits up to the order of a sum."""
    model = saved(llama(hidden_size=64, intermediate_size=128), tmp_path / "model", with_tokenizer=False)
    write_quantized(model, tmp_path / "packed", "compressed-tensors", scheme_of, dtype)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad(), quiet():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
        expected = theirs(tokens).logits
        ours = load_model(open_checkpoint(str(tmp_path / "packed")), dtype="F32")
        found = ours(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens).logits
    weights = ours.state_dict()
    for layer in LAYERS:
        assert torch.equal(weights[f"{layer}.weight"], theirs.get_parameter(f"{layer}.weight"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()  # it was quantized
