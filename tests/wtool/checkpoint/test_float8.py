"""Checkpoints of 8-bit floats read as plain ones: by loops, by transformers, and in a merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM

from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.checkpoint.quantized import refuse_quantized
from wtool.cli import run
from wtool.errors import MalformedFile, MissingInput, QuantizedInput
from wtool.loading import load_model
from wtool.shards import json_bytes

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama(), tmp_path_factory.mktemp("model") / "llama")


def coded(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in blocks, each by itself: codes and the scales that they are to be multiplied with."""
    (rows, columns), (height, width) = weight.shape, block
    codes = torch.empty_like(weight, dtype=E4M3)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    for a in range(scales.shape[0]):
        for b in range(scales.shape[1]):
            here = slice(a * height, (a + 1) * height), slice(b * width, (b + 1) * width)
            scales[a, b] = weight[here].abs().max() / 448
            codes[here] = (weight[here] / scales[a, b]).to(E4M3)
    return codes, scales


def spread(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """What they stand for, weight by weight in float64, rounded to float32 at the end."""
    values = codes.double()
    for r in range(values.shape[0]):
        for i in range(values.shape[1]):
            values[r, i] *= float(scales[r // block[0], i // block[1]])
    return values.float()


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: Any, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    content = {**config, **({} if settings is None else {"quantization_config": settings})}
    (folder / "config.json").write_bytes(json_bytes(content))
    return folder


def deepseek(
    model: Path, folder: Path, block: tuple[int, int] = (16, 16), seed: float = 1.0
) -> dict[str, torch.Tensor]:
    """A model as DeepSeek's are stored; returns what it stands for."""
    tensors, values = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        values[name] = tensors[name] = weight * seed
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = codes, scales = coded(weight * seed, block)
            values[name] = spread(codes, scales, block)
    config = json.loads((model / "config.json").read_text())
    write(folder, tensors, {**DEEPSEEK, "weight_block_size": list(block)}, **config)
    for file in model.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return values


@pytest.mark.parametrize("block", [(16, 16), (24, 20), (128, 128)])
def test_blocks_are_decoded_and_nothing_tells_of_them_any_more(model: Path, tmp_path: Path, block) -> None:
    values = deepseek(model, tmp_path / "fp8", block)
    checkpoint = open_checkpoint(str(tmp_path / "fp8"))
    assert set(checkpoint.tensors) == set(values) and "quantization_config" not in checkpoint.config
    for name, value in values.items():
        assert torch.equal(checkpoint.read(name).float(), value)
        assert checkpoint.tensors[name].dtype == "F32" and checkpoint.tensors[name].shape == tuple(value.shape)
    assert checkpoint.quantization == f"FP8, a scale for each block of {block[0]} x {block[1]}, in 14 layer(s)"


def test_transformers_decodes_the_same(tmp_path: Path) -> None:
    deepseek(saved(llama().bfloat16(), tmp_path / "model"), tmp_path / "fp8")
    ids = torch.arange(40)[None] * 7 % 320
    ours = load_model(open_checkpoint(str(tmp_path / "fp8")), dtype="BF16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    assert theirs.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_merging_is_merging_what_is_decoded(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for name, seed in (("a", 1.0), ("b", -0.3)):
        values = deepseek(model, tmp_path / name, seed=seed)
        write(tmp_path / f"{name}-plain", values, None, **config)
    for ending in ("", "-plain"):
        sources = [str(tmp_path / f"{name}{ending}") for name in ("a", "b")]
        assert run(["merge", *sources, "--method", "linear", "-o", str(tmp_path / f"m{ending}")]) == 0
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "m-plain"))
    assert set(merged) == set(plain) and all(torch.equal(merged[name], plain[name]) for name in plain)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


MATRIX = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
CODES = MATRIX.to(E4M3)
GROUP = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def groups(*weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    entries = {f"group_{i}": {"targets": ["Linear"], "weights": {**GROUP, **w}} for i, w in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": entries, **more}


@pytest.mark.parametrize(
    ("name", "scale", "factor", "settings"),
    [
        ("weight_scale", torch.tensor(0.5), 0.5, {"quant_method": "fp8"}),
        ("weight_scale_inv", torch.tensor([0.5]), 0.5, {"quant_method": "fp8", "weight_block_size": None}),
        ("weight_scale", torch.arange(1.0, 7), torch.arange(1.0, 7)[:, None], {"quant_method": "fbgemm_fp8"}),
        ("weight_scale", torch.arange(1.0, 7)[:, None], torch.arange(1.0, 7)[:, None], groups({"strategy": "channel"})),
        ("weight_scale", torch.tensor([2.0]).bfloat16(), 2.0, groups({"strategy": "tensor"})),
        ("weight_scale", torch.tensor(3.0), 3.0, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        ("weight_scale", torch.tensor(3.0), 3.0, None),
        ("weight_scale_inv", torch.tensor([[4.0]]).to(torch.float8_e8m0fnu), 4.0, DEEPSEEK),
        (
            "weight_scale",
            torch.arange(1.0, 7).reshape(3, 2),
            torch.arange(1.0, 7).reshape(3, 2).repeat_interleave(2, 0).repeat_interleave(4, 1),
            groups({"strategy": "block", "block_structure": [2, 4]}),
        ),
        (
            "weight_scale",
            torch.arange(1.0, 13).reshape(6, 2),
            torch.arange(1.0, 13).reshape(6, 2).repeat_interleave(4, 1),
            groups({"strategy": "group", "group_size": 4}),
        ),
    ],
)
@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_every_form_of_scales(tmp_path: Path, kind, name: str, scale, factor, settings) -> None:
    norm = torch.ones(8).bfloat16()
    inputs = {"a.input_scale": torch.tensor(1.0), "a.activation_scale": torch.tensor(1.0)}
    tensors = {"a.weight": MATRIX.to(kind), f"a.{name}": scale, "norm.weight": norm, **inputs}
    checkpoint = open_checkpoint(str(write(tmp_path, tensors, settings)))
    assert {key: info.dtype for key, info in checkpoint.tensors.items()} == {"a.weight": "BF16", "norm.weight": "BF16"}
    assert torch.equal(checkpoint.read("a.weight"), MATRIX.to(kind).float() * factor)
    assert torch.equal(checkpoint.read("norm.weight"), norm)
    refuse_quantized(checkpoint)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    codes = torch.stack([CODES, CODES])
    scales = torch.rand(2, 3, 2)
    tensors = {"experts.up": codes, "experts.up_scale_inv": scales}
    checkpoint = open_checkpoint(str(write(tmp_path, tensors, {**DEEPSEEK, "weight_block_size": [2, 4]})))
    wanted = torch.stack([spread(CODES, scales[e], (2, 4)) for e in range(2)])
    assert torch.equal(checkpoint.read("experts.up"), wanted)


@pytest.mark.parametrize(
    ("tensors", "settings", "error", "message"),
    [
        ({"b.weight": CODES.clone()}, DEEPSEEK, MissingInput, "no tensor 'b.weight_scale': its weight is packed"),
        (
            {"b.weight": CODES.clone(), "b.weight_scale": torch.ones(5)},
            None,
            MalformedFile,
            "'b.weight_scale' is F32 [5]; of a weight [6, 8]",
        ),
        (
            {"b.weight": CODES.clone(), "b.weight_scale": torch.ones(6).int()},
            None,
            MalformedFile,
            "is I32 [6]; of a weight",
        ),
        ({}, {**DEEPSEEK, "weight_block_size": [128]}, MalformedFile, "'weight_block_size' is [128], not two numbers"),
        ({}, {**DEEPSEEK, "weight_block_size": [0, 4]}, MalformedFile, "not two numbers above 0"),
        ({}, "fp8", MalformedFile, "quantization_config: is no object"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, tensors, settings, error, message: str) -> None:
    folder = write(tmp_path, {"a.weight": CODES, "a.weight_scale": torch.ones(1), **tensors}, settings)
    with pytest.raises(error) as caught:
        open_checkpoint(str(folder))
    assert message in str(caught.value) and str(caught.value).startswith(f"{folder}: ")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized (modelopt)"),
        ({"quant_method": "quark"}, "quantized (quark)"),
        (groups({"strategy": "tensor"}, kv_cache_scheme={"num_bits": 8}), "its kv_cache_scheme says more"),
        (groups({"num_bits": 4, "strategy": "tensor"}), "quantized (compressed-tensors"),
    ],
)
def test_what_is_more_than_scaled_weights_is_refused_by_name(tmp_path: Path, settings, told: str) -> None:
    checkpoint: Checkpoint = open_checkpoint(
        str(write(tmp_path, {"a.weight": CODES, "a.weight_scale": torch.ones(1)}, settings))
    )
    with pytest.raises(QuantizedInput) as caught:
        refuse_quantized(checkpoint)
    assert told in str(caught.value)
