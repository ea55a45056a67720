"""`wtool inspect`: the figures agree with the model, and nothing but headers is read, without torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from quantized_models import write_quantized
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved

from wtool.cli import run
from wtool.formats import Scheme
from wtool.grid import Grid
from wtool.shards import json_bytes


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("tied", [True, False])
def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool) -> None:
    model = llama(tie_word_embeddings=tied).bfloat16()
    found = inspected(capsys, str(saved(model, tmp_path)))
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["bytes"] == 2 * found["parameters"] == found["bytes_by_dtype"]["BF16"]
    assert found["tensors"] == 2 * 9 + (2 if tied else 3)
    assert (found["tied"], found["kind"], found["quantization"], found["revision"]) == (tied, "safetensors", None, None)
    assert found["config"] == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 48,
        "vocabulary": 320,
        "context": 64,
    }
    weights = tmp_path / "model.safetensors"
    assert found["shards"] == [{"name": weights.name, "bytes": weights.stat().st_size}]
    assert found["files"] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    queries = next(group for group in found["groups"] if group["name"].endswith("q_proj.weight"))
    assert queries == {
        "name": "model.layers.*.self_attn.q_proj.weight",
        "count": 2,
        "dtypes": ["BF16"],
        "shapes": [[32, 32]],
        "bytes": 2 * 2 * 32 * 32,
    }


def test_a_head_stored_beside_the_embedding_it_is_tied_to_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(tie_word_embeddings=True)
    saved(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspected(capsys, str(tmp_path))
    assert found["parameters"] == model.num_parameters()
    assert found["bytes"] == 4 * (model.num_parameters() + 320 * 32)  # as it lies on disk


def test_each_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    found = inspected(capsys, str(saved(model, tmp_path)), "--tensors")["tensor_list"]
    assert {row["name"]: row["shape"] for row in found} == {
        name: list(tensor.shape) for name, tensor in model.state_dict().items()
    }


def test_groups_of_experts_and_of_unlike_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {f"model.layers.{i}.experts.{j}.w1.weight": torch.zeros(2 + i, 3) for i in range(5) for j in range(4)}
    save_file({**tensors, "0.weight": torch.zeros(1), "scale": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    groups = {group["name"]: group for group in inspected(capsys, str(tmp_path))["groups"]}
    assert set(groups) == {"model.layers.*.experts.*.w1.weight", "*.weight", "scale"}
    experts = groups["model.layers.*.experts.*.w1.weight"]
    assert experts["count"] == 20 and len(experts["shapes"]) == 5
    assert run(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 × 3, 3 × 3, 4 × 3, … (5 shapes)" in shown and "scalar" in shown and "no config.json" in shown


def test_shown_to_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama().half()
    assert run(["inspect", str(saved(model, tmp_path))]) == 0
    shown = capsys.readouterr().out
    assert f"({model.num_parameters():,}) in 21 tensors" in shown
    assert "llama (LlamaForCausalLM), head of its own" in shown
    assert "layers 2, hidden 32, heads 4, kv heads 2" in shown
    assert "model.layers.*.mlp.up_proj.weight" in shown and "F16" in shown


def test_an_adapter_changes_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = saved(llama(), tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes(json_bytes({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    found, plain = inspected(capsys, f"{base}+{adapter}"), inspected(capsys, str(base))
    assert found["kind"] == "safetensors + LoRA adapter" and found["files"] == plain["files"]
    assert found["groups"] == plain["groups"] and found["parameters"] == plain["parameters"]


def test_a_quantized_checkpoint_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 48, dtype=torch.int32)}
    save_file(packed, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "aqlm", "bits": 4, "group_size": 128}}
    (tmp_path / "config.json").write_bytes(json_bytes(config))
    found = inspected(capsys, str(tmp_path))
    assert found["quantization"] == {"quant_method": "aqlm", "bits": 4, "group_size": 128}
    assert found["decoded_from"] is None
    assert run(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "quant_method aqlm, bits 4, group_size 128" in shown and "stored values" in shown


def test_a_quantized_checkpoint_that_is_decoded_is_shown_as_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(hidden_size=64, intermediate_size=128).bfloat16()
    saved(model, tmp_path / "model", with_tokenizer=False)
    write_quantized(tmp_path / "model", tmp_path / "packed", "gptq", lambda layer: Scheme(Grid(4, 64)), "BF16")
    found, plain = (inspected(capsys, str(tmp_path / name)) for name in ("packed", "model"))
    for key in ("parameters", "bytes", "tensors", "config", "quantization"):
        assert found[key] == plain[key]
    assert found["bytes_on_disk"] < 0.6 * plain["bytes_on_disk"]
    assert found["decoded_from"] == "gptq 4 bits, groups of 64, symmetric"
    assert run(["inspect", str(tmp_path / "packed")]) == 0
    shown = capsys.readouterr().out
    assert "gptq 4 bits, groups of 64, symmetric" in shown and "unpacked" in shown and "on disk" in shown


def test_a_remote_model_is_not_downloaded(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    hub.add("tiny/llama", saved(model, tmp_path / "model"))
    found = inspected(capsys, "tiny/llama")
    assert found["parameters"] == model.num_parameters() and len(found["revision"]) == 40
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_no_torch(tmp_path: Path) -> None:
    """It answers at once: torch alone takes seconds to import."""
    saved(llama(), tmp_path)
    code = (
        "import sys; from wtool.cli import run; run(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    for more in ([], ["--json"], ["--tensors"]):
        subprocess.run([sys.executable, "-c", code, "inspect", str(tmp_path), *more], check=True, capture_output=True)


def test_what_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "nowhere")]) == 3
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"
