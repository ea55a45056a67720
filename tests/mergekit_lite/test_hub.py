"""Merging models of the Hub, from a local server that speaks its API."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wtool.cli import run


@pytest.fixture
def repositories(hub, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    for name in ("base", "a", "b"):
        LlamaForCausalLM(config).save_pretrained(tmp_path / name, max_shard_size="20KB")
        (tmp_path / name / "README.md").write_text("---\nbase_model: org/base\n---\n")
        (tmp_path / name / "training_args.bin").write_bytes(b"not wanted")
        hub.add(f"org/{name}", tmp_path / name)
    return hub


def test_hub_models_merge_as_local_ones_do(repositories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--method", "ties", "--density", "0.5"]
    assert run(["merge", "org/a", "org/b@main", *command, "--base", "org/base", "-o", "remote"]) == 0
    assert run(["merge", "a", "b", *command, "--base", "base", "-o", "local"]) == 0
    remote, local = (load_file(tmp_path / name / "model.safetensors") for name in ("remote", "local"))
    assert all(torch.equal(remote[name], tensor) for name, tensor in local.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "remote")
    inputs = json.loads((tmp_path / "remote/wtool.json").read_text())["inputs"]
    assert all(len(each["revision"]) == 40 for each in inputs)
    assert "base_model:\n- org/base\n- org/a\n- org/b\n" in (tmp_path / "remote/README.md").read_text()


def test_a_dry_run_downloads_no_weights(repositories, tmp_path, capsys):
    command = ["merge", "org/a", "org/b", "--method", "ties", "--dry-run", "--json"]  # the base is that of the cards
    assert run(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["inputs"] == ["org/base", "org/a", "org/b"] and plan["tensors"] > 0 and not plan["problems"]
    cached = [path.name for path in (tmp_path / "hf").rglob("*") if path.name.endswith(".safetensors")]
    assert not cached


def test_a_repository_that_is_not_there_is_one_line(repositories, capsys, tmp_path):
    assert run(["merge", "org/a", "org/nowhere", "-o", str(tmp_path / "out")]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("error: org/nowhere: ") and shown.count("\n") == 1
