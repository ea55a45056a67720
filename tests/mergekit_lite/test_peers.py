"""Beside mergekit 0.1.5: the same tensors and checkpoints through both.

Needs mergekit in the environment (pip install 'wtool[peers]'), or in another one whose python WTOOL_MERGEKIT_PYTHON
names. Where definitions agree the results must; where they differ on purpose, the difference itself is checked.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.passthrough import passthrough
from mergekit_lite.methods.slerp import slerp
from mergekit_lite.methods.task_arithmetic import task_arithmetic
from mergekit_lite.methods.ties import ties
from wtool.cli import run

PYTHON = os.environ.get("WTOOL_MERGEKIT_PYTHON") or (sys.executable if importlib.util.find_spec("mergekit") else None)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(PYTHON is None, reason="mergekit is not here: pip install mergekit==0.1.5"),
]

# case -> (mergekit's method and parameters, ours)
CASES = {
    "linear": ("linear", {"weight": [0.3, 0.5, 0.9]}, lambda b, m: linear(m, weight=[0.3, 0.5, 0.9])),
    "linear sum": (
        "linear",
        {"weight": [0.3, -0.5, 0.9], "normalize": False},
        lambda b, m: linear(m, weight=[0.3, -0.5, 0.9], normalize=False),
    ),
    "slerp": ("slerp", {"t": 0.3}, lambda b, m: slerp([b, m[0]], t=0.3)),
    "slerp near": ("slerp", {"t": 0.3}, lambda b, m: slerp([b, b + 0.001 * m[0]], t=0.3)),
    "task_arithmetic": (
        "task_arithmetic",
        {"weight": [0.3, 0.5, 0.9], "lambda": 0.7},
        lambda b, m: task_arithmetic(b, m, weight=[0.3, 0.5, 0.9], lambda_=0.7),
    ),
    "task_arithmetic mean": (
        "task_arithmetic",
        {"weight": [0.3, 0.5, 0.9], "normalize": True},
        lambda b, m: task_arithmetic(b, m, weight=[0.3, 0.5, 0.9], normalize=True),
    ),
    "ties": (
        "ties",
        {"weight": [0.3, 0.5, 0.9], "density": [0.5, 0.25, 0.75]},
        lambda b, m: ties(b, m, weight=[0.3, 0.5, 0.9], density=[0.5, 0.25, 0.75]),
    ),
    "ties sum": (
        "ties",
        {"weight": [1.0, 1.0, 1.0], "density": [0.2, 0.2, 0.2], "normalize": False, "lambda": 1.3},
        lambda b, m: ties(b, m, weight=[1.0, 1.0, 1.0], density=[0.2, 0.2, 0.2], normalize=False, lambda_=1.3),
    ),
    "ties rescaled": (
        "ties",
        {"weight": [1.0, 1.0, 0.5], "density": [0.2, 0.2, 1.0], "rescale": True},
        lambda b, m: ties(b, m, weight=[1.0, 1.0, 0.5], density=[0.2, 0.2, 1.0], rescale=True),
    ),
    "ties negative": (
        "ties",
        {"weight": [1.0, -0.5, 0.5], "density": [0.5, 0.5, 0.5], "normalize": False},
        lambda b, m: ties(b, m, weight=[1.0, -0.5, 0.5], density=[0.5, 0.5, 0.5], normalize=False),
    ),
    "passthrough": ("passthrough", {"scale": 0.7}, lambda b, m: passthrough([b], scale=0.7)),
}
HAS_BASE = ("task_arithmetic", "ties")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Run all cases in one process of mergekit."""
    folder = tmp_path_factory.mktemp("peer")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(97, 61, generator=generator)
    models = [base + 0.3 * torch.randn(97, 61, generator=generator) for _ in range(3)]
    tensors = {"base": base, "near": base + 0.001 * models[0], **{f"m{i}": model for i, model in enumerate(models)}}
    cases = {}
    for name, (method, parameters, _) in CASES.items():
        has_base = method in HAS_BASE
        inputs = {"slerp": ["base", "near" if name == "slerp near" else "m0"], "passthrough": ["base"]}.get(
            method, [*(["base"] if has_base else []), "m0", "m1", "m2"]
        )
        base_index = 0 if has_base or method == "slerp" else None
        cases[name] = {"method": method, "parameters": parameters, "inputs": inputs, "base": base_index}
    (folder / "cases.json").write_text(json.dumps(cases))
    save_file(tensors, folder / "tensors.safetensors")
    script = Path(__file__).parents[1] / "peers_mergekit.py"
    arguments = [folder / "cases.json", folder / "tensors.safetensors", folder / "out.safetensors"]
    done = subprocess.run([str(PYTHON), str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return base, models, load_file(folder / "out.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(theirs, case):
    base, models, results = theirs
    ours = CASES[case][2](base, models)
    print(f"{case}: largest deviation {(ours - results[case]).abs().max().item():.2e}")
    torch.testing.assert_close(ours, results[case], rtol=2e-6, atol=2e-6)


YAML = {
    "linear": (
        "merge_method: linear\nmodels:\n- {model: A, parameters: {weight: 0.3}}\n"
        "- {model: B, parameters: {weight: 0.9}}\n"
    ),
    "linear with a base": (  # which joins the models if the weight is for all
        "merge_method: linear\nbase_model: BASE\nmodels: [{model: A}, {model: B}]\nparameters: {weight: 0.4}\n"
    ),
    "slerp": (
        "merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}]\n"
        "parameters:\n  t:\n  - {filter: self_attn, value: [0, 0.5, 1]}\n"
        "  - {filter: mlp, value: 0.2}\n  - value: 0.5\n"
    ),
    "ties": (
        "merge_method: ties\nbase_model: BASE\nmodels:\n- {model: BASE}\n"
        "- {model: A, parameters: {weight: [0.2, 0.9], density: 0.5}}\n"
        "- {model: B, parameters: {weight: 0.5, density: [{filter: mlp, value: 0.3}, {value: 0.6}]}}\n"
        "parameters: {normalize: true, int8_mask: true}\ndtype: float32\n"
    ),
    "task_arithmetic": (
        "merge_method: task_arithmetic\nbase_model: BASE\nmodels:\n- {model: A, parameters: {weight: 0.7}}\n"
        "- {model: B, parameters: {weight: -0.2}}\nparameters: {lambda: 0.8}\n"
    ),
}
AFTER_LAYERS = ("model.norm.weight", "lm_head.weight")  # mergekit takes a gradient's first value there, we its last


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    for name in ("a", "b"):
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        model.save_pretrained(folder / name, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("method", YAML)
def test_the_same_file_gives_the_same_checkpoint(checkpoints, tmp_path, method):
    text = YAML[method].replace("BASE", str(checkpoints / "base"))
    for name in ("A", "B"):
        text = text.replace(f"model: {name}", f"model: {checkpoints / name.lower()}")
    (tmp_path / "recipe.yml").write_text(text)
    program = Path(str(PYTHON)).parent / "mergekit-yaml"
    done = subprocess.run(
        [str(program), str(tmp_path / "recipe.yml"), str(tmp_path / "theirs"), "--quiet"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "ours")]) == 0
    theirs, ours = (
        {k: v for path in (tmp_path / name).glob("*.safetensors") for k, v in load_file(path).items()}
        for name in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if name in AFTER_LAYERS and method == "ties":
            assert not torch.equal(ours[name], tensor)  # the documented difference
            continue
        assert ours[name].dtype == tensor.dtype, name
        torch.testing.assert_close(ours[name], tensor, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
