"""Packed weights: decoded to the values they stand for, or refused by name, and every contradiction told in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from quantized_models import rounded, write_quantized
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved
from transformers import GPT2Config, GPT2LMHeadModel

from wtool.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from wtool.checkpoint.quantized import refuse_quantized
from wtool.cli import run
from wtool.errors import MalformedFile, MissingInput, QuantizedInput
from wtool.formats import FORMATS, Scheme
from wtool.grid import Grid, Quantized
from wtool.loading import load_model, quiet
from wtool.shards import json_bytes

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(llama(hidden_size=64, intermediate_size=128), tmp_path / "model")


def mixed(layer: str) -> Scheme | None:
    """Schemes that all formats can hold."""
    if "layers.1.mlp" in layer:
        return None
    return Scheme(Grid(8, -1)) if "down" in layer else Scheme(Grid(4, 32))


def fitting(name: str) -> Callable[[str], Scheme | None]:
    """Schemes that a format can hold: AWQ's has one for all."""
    return (lambda layer: mixed(layer) and Scheme(Grid(4, 32))) if name == "awq" else mixed


def values(held: dict[str, Quantized]) -> dict[str, torch.Tensor]:
    """What each packed layer stands for, computed in double precision with a loop over groups, rounded once."""
    found = {}
    for layer, quantized in held.items():
        weight = quantized.codes.double()
        for group in range(quantized.scales.shape[1]):
            inside = quantized.group_index == group
            if quantized.zeros is not None:
                weight[:, inside] -= quantized.zeros[:, group : group + 1]
            weight[:, inside] *= quantized.scales[:, group : group + 1].double()
        found[f"{layer}.weight"] = weight.float()
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_checkpoint_looks_like_a_plain_one(model: Path, tmp_path: Path, name: str) -> None:
    held = values(write_quantized(model, tmp_path / "packed", name, fitting(name)))
    plain, packed = open_checkpoint(str(model)), open_checkpoint(str(tmp_path / "packed"))
    assert dict(packed.tensors) == dict(plain.tensors)
    assert packed.config == plain.config and (packed.nbytes, packed.parameters) == (plain.nbytes, plain.parameters)
    refuse_quantized(packed)
    for tensor in plain.tensors:
        packed.prefetch(tensor)
        read = packed.read(tensor)
        assert read.dtype == torch.float32 and read.is_contiguous()
        assert torch.equal(read, held.get(tensor, plain.read(tensor)))
        packed.forget(tensor)
    assert len(held) == 11 and plain.quantization is None
    grids = "4 bits, groups of 32, symmetric in 10 layer(s); 8 bits, whole rows, symmetric in 1 layer(s)"
    assert packed.quantization == f"{name} {'4 bits, groups of 32, asymmetric' if name == 'awq' else grids}"
    assert [file.name for file in packed.identity()] == ["model.safetensors"]
    assert packed.folders() == [(tmp_path / "packed").resolve()]
    with pytest.raises(MissingInput, match="no tensor 'model.layers.0.self_attn.q_proj.qweight'"):
        packed.read(f"{Q}.qweight")


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq_v2"])
def test_asymmetric_grids(model: Path, tmp_path: Path, name: str) -> None:
    held = values(write_quantized(model, tmp_path / "packed", name, lambda layer: Scheme(Grid(3, 32, False))))
    packed = open_checkpoint(str(tmp_path / "packed"))
    assert all(torch.equal(packed.read(tensor), weight) for tensor, weight in held.items())
    assert packed.quantization == f"{name} 3 bits, groups of 32, asymmetric"


@pytest.mark.parametrize(
    ("change", "announced"),
    [({"dtype": "bfloat16"}, "BF16"), ({"dtype": None, "torch_dtype": "float16"}, "F16"), ({"dtype": None}, "F16")],
)
def test_weights_are_announced_in_the_type_of_the_model(
    model: Path, tmp_path: Path, change: dict[str, Any], announced: str
) -> None:
    write_quantized(model, tmp_path / "packed", "gptq", mixed)  # whose scales are F16
    edit_config(tmp_path / "packed", lambda config: config.update(change))
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    assert checkpoint.tensors[f"{Q}.weight"] == TensorInfo(announced, (64, 64))
    assert checkpoint.read(f"{Q}.weight").dtype == torch.float32


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_bytes(json_bytes(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("scheme", [Scheme(Grid(4, -1)), Scheme(Grid(4, 16))], ids=str)
def test_inputs_that_do_not_fill_the_last_word_or_group(tmp_path: Path, scheme: Scheme) -> None:
    """Words and scales leave their number open then; weight_shape tells it."""
    format = FORMATS["compressed-tensors"]
    for inputs in (32, 24, 17, 1):
        held = rounded(torch.randn(3, inputs), scheme)
        parts = {f"x.{suffix}": part for suffix, part in format.encode(held, scheme).items()}
        save_file(parts, tmp_path / "model.safetensors")
        settings = {"quantization_config": format.settings({"x": scheme}, [])}
        (tmp_path / "config.json").write_bytes(json_bytes(settings))
        checkpoint = open_checkpoint(str(tmp_path))
        assert checkpoint.tensors == {"x.weight": TensorInfo("F16", (3, inputs))}
        assert torch.equal(checkpoint.read("x.weight"), held.values())


@pytest.mark.parametrize("name", FORMATS)
def test_a_remote_model_is_opened_by_its_headers(hub: HubServer, model: Path, tmp_path: Path, name: str) -> None:
    held = write_quantized(model, tmp_path / "packed", name, fitting(name))
    hub.add("tiny/packed", tmp_path / "packed")
    remote = open_checkpoint("tiny/packed", headers_only=True)
    local = open_checkpoint(str(tmp_path / "packed"))
    assert dict(remote.tensors) == dict(local.tensors) and remote.quantization == local.quantization
    assert remote.revision is not None and not list((tmp_path / "hf").rglob("*.safetensors"))
    with pytest.raises(MissingInput, match="only the header was fetched"):
        remote.read(f"{Q}.weight")
    downloaded = open_checkpoint("tiny/packed")
    assert torch.equal(downloaded.read(f"{Q}.weight"), held[Q].values())
    assert downloaded.revision == remote.revision


# What other verbs make of it


def test_it_is_merged_like_any_other(model: Path, tmp_path: Path) -> None:
    held = [
        values(write_quantized(model, tmp_path / name, name, lambda layer, bits=bits: Scheme(Grid(bits, 32))))
        for name, bits in (("gptq", 4), ("compressed-tensors", 6))
    ]
    out = tmp_path / "out"
    sources = [str(tmp_path / "gptq"), str(tmp_path / "compressed-tensors")]
    assert run(["merge", *sources, "--method", "linear", "--ignore-tokenizers", "-o", str(out)]) == 0
    merged = load_file(out / "model.safetensors")
    assert set(merged) == set(load_file(model / "model.safetensors"))
    for tensor in held[0]:
        expected = (held[0][tensor] + held[1][tensor]) / 2
        assert torch.allclose(merged[tensor], expected, rtol=1e-6, atol=1e-6)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    llama_again = load_model(open_checkpoint(str(out)), dtype="F32")
    assert llama_again.num_parameters() == llama(hidden_size=64, intermediate_size=128).num_parameters()


def test_an_adapter_goes_on_top(model: Path, tmp_path: Path) -> None:
    held = write_quantized(model, tmp_path / "packed", "gptq", mixed)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes(json_bytes({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    factors = {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    read = open_checkpoint(f"{tmp_path / 'packed'}+{adapter}").read(f"{Q}.weight")
    assert torch.allclose(read, held[Q].values() + 2 * b @ a, atol=1e-5)


def test_gpt2_whose_plain_weights_have_their_inputs_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    folder, format, scheme = tmp_path / "gpt2", FORMATS["gptq"], Scheme(Grid(4, 32))
    with quiet():
        gpt2.save_pretrained(folder)
    tensors, schemes = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))]:
        held = rounded(tensors.pop(name).T, scheme)
        layer = name.removesuffix(".weight")
        schemes[layer] = scheme
        tensors |= {f"{layer}.{suffix}": part for suffix, part in format.encode(held, scheme).items()}
        gpt2.get_parameter(name if name.startswith("transformer") else f"transformer.{name}").data = held.values().T
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, lambda config: config.update(quantization_config=format.settings(schemes, ["lm_head"])))
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        found = load_model(open_checkpoint(str(folder)), dtype="F32")(tokens).logits
        assert torch.allclose(found, gpt2(tokens).logits, atol=1e-5)
    assert len(schemes) == 4


# What cannot be right


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(f"{Q}.{name}")


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({f"{Q}.{name}": value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("compressed-tensors", drop("weight_scale"), f"no tensor '{Q}.weight_scale': its weight is packed and cannot"),
        ("compressed-tensors", drop("weight_shape"), f"no tensor '{Q}.weight_shape'"),
        ("compressed-tensors", put("weight_scale", torch.ones(64)), "is F32 [64], not 2 dimensions for 4 bits, groups"),
        (
            "compressed-tensors",
            put("weight_scale", torch.ones(64, 3)),
            f"'{Q}.weight_scale' is F32 [64, 3], not F32 [64, 2]",
        ),
        (
            "compressed-tensors",
            put("weight_scale", torch.ones(63, 2)),
            "is F32 [63, 2], not F32 [64, 2] for [64, 64] in 4",
        ),
        ("compressed-tensors", put("weight_scale", torch.ones(64, 2).int()), "is I32 [64, 2], not F32 [64, 2]"),
        (
            "compressed-tensors",
            put("weight_packed", torch.ones(64, 8)),
            "is F32 [64, 8], not I32 [64, 8] for [64, 64] in",
        ),
        (
            "compressed-tensors",
            put("weight", torch.ones(64, 64)),
            f"'{Q}' has both 'weight' and 'weight_packed'",
        ),
        ("gptq", drop("qzeros"), f"no tensor '{Q}.qzeros'"),
        ("gptq", put("qweight", torch.ones(9, 64).int()), f"'{Q}.qzeros' is I32 [2, 8], not I32 [3, 8] for [64, 72]"),
        ("gptq", put("qweight", torch.ones(0, 64).int()), "is I32 [0, 64], not 2 dimensions"),
        ("gptq", put("g_idx", torch.zeros(63).int()), "is I32 [63], not I32 [64]"),
    ],
)
def test_headers_that_contradict_each_other(model: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    folder = tmp_path / "packed"
    write_quantized(model, folder, name, lambda layer: Scheme(Grid(4, 32)))
    edit_tensors(folder, change)
    with pytest.raises((MalformedFile, MissingInput)) as caught:
        open_checkpoint(str(folder))
    assert message in str(caught.value) and str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "compressed-tensors",
            put("weight_shape", torch.tensor([64, 60])),
            "weight_shape says [64, 60], the other tensors",
        ),
        ("gptq", put("g_idx", torch.full((64,), 7).int()), "g_idx names groups outside of 0 to 1"),
    ],
)
def test_data_that_contradicts_headers(model: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    folder = tmp_path / "packed"
    write_quantized(model, folder, name, lambda layer: Scheme(Grid(4, 32)))
    edit_tensors(folder, change)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(MalformedFile) as caught:
        checkpoint.read(f"{Q}.weight")
    assert f"{folder}: '{Q}': {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gptq", {"bits": None}, "quantization_config: 'bits' is None, not of type int"),
        ("gptq", {"bits": 8}, f"'{Q}.qzeros' is I32 [2, 8], not I32 [1, 16] for [64, 32] in 8 bits, groups of 32"),
        ("gptq", {"group_size": 16}, "is I32 [2, 8], not I32 [4, 8] for [64, 64] in 4 bits, groups of 16, symmetric"),
        ("compressed-tensors", {"config_groups": {}}, f"quantization_config: '{Q}': no config group has '{Q}' among"),
        ("compressed-tensors", {"config_groups": []}, "quantization_config: 'config_groups' is [], not of type dict"),
    ],
)
def test_settings_that_contradict_the_tensors(
    model: Path, tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "packed"
    write_quantized(model, folder, name, lambda layer: Scheme(Grid(4, 32)) if layer == Q else None)
    edit_config(folder, lambda config: config["quantization_config"].update(settings))
    with pytest.raises(MalformedFile) as caught:
        open_checkpoint(str(folder))
    assert message in str(caught.value) and str(caught.value).startswith(f"{folder}: ")


def stored(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes(json_bytes(config))
    return open_checkpoint(str(folder))


def settings(method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **more}}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"q.weight": torch.ones(2, 2).char(), "q.weight_scale_inv": torch.ones(1)},
            {},
            "quantized, see tensor 'q.weight_scale_inv' (F32)",
        ),
        ({"q.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {}, "'q.weight' (F8_E4M3)"),
        (
            {"q.qweight": torch.ones(2, 2).int()},
            settings("awq", bits=3, group_size=64, zero_point=True),
            "quantized (awq, codes of 3 bits), see tensor 'q.qweight' (I32)",
        ),
        ({"q.qweight": torch.ones(2, 2).int()}, {}, "quantized, see tensor 'q.qweight'"),
        ({"q.weight": torch.ones(2)}, settings("fp8"), "quantized (fp8), see config.json: quantization_config"),
        (
            {"q.qweight": torch.ones(2, 2).int()},
            settings("gptq", bits=4, group_size=64, checkpoint_format="marlin"),
            "quantized (gptq, marlin), see tensor 'q.qweight'",
        ),
        (
            {"q.weight": torch.ones(2, 2).char(), "q.weight_scale": torch.ones(2, 1)},
            settings("compressed-tensors", format="int-quantized", config_groups={"a": {"weights": {"num_bits": 8}}}),
            "quantized (compressed-tensors, weights as int-quantized), see tensor 'q.weight_scale'",
        ),
        ({"q.weight": torch.ones(2)}, settings("gptq", bits=4, group_size=64), "quantized (gptq), see config.json"),
    ],
)
def test_packed_weights_that_are_not_decoded_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    checkpoint = stored(tmp_path, tensors, config)
    assert set(checkpoint.tensors) == set(tensors) and checkpoint.quantization is None
    with pytest.raises(QuantizedInput) as caught:
        refuse_quantized(checkpoint)
    assert message in str(caught.value)


def test_parts_that_are_left_over_are_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    write_quantized(model, folder, "compressed-tensors", lambda layer: Scheme(Grid(4, 32)))
    edit_tensors(folder, put("input_scale", torch.ones(1)))
    with pytest.raises(QuantizedInput, match="input_scale"):
        refuse_quantized(open_checkpoint(str(folder)))


def test_settings_that_are_no_object(tmp_path: Path) -> None:
    with pytest.raises(MalformedFile, match="config.json: quantization_config is no object"):
        stored(tmp_path, {"q": torch.ones(2)}, {"quantization_config": "gptq"})
