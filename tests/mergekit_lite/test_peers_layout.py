"""Beside mergekit 0.1.5: the same YAML with slices, modules and stages through both programs.

Needs mergekit as test_peers.py does.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import any_saved
from layered import config, weights
from tiny_models import llama, saved

from wtool.cli import run

PYTHON = os.environ.get("WTOOL_MERGEKIT_PYTHON") or (sys.executable if importlib.util.find_spec("mergekit") else None)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(PYTHON is None, reason="mergekit is not here: pip install mergekit==0.1.5"),
]
AFTER = ("model.norm.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ABC"):
        saved(llama(seed, num_hidden_layers=4, initializer_range=0.02), folder / name)
    return folder


def both(models, tmp_path, text, program="mergekit-yaml", code=0):
    """The weights of their output and of ours."""
    for name in "ABC":
        text = text.replace(f"model: {name}", f"model: {models / name}")
    (tmp_path / "recipe.yml").write_text(text)
    arguments = [str(tmp_path / "recipe.yml")]
    if program == "mergekit-multi":
        arguments += ["-I", str(tmp_path / "stages"), "--out-path", str(tmp_path / "theirs")]
    else:
        arguments += [str(tmp_path / "theirs")]
    done = subprocess.run(
        [str(Path(str(PYTHON)).parent / program), *arguments, "--no-write-model-card", "--no-copy-tokenizer"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "ours")]) == code
    return weights(tmp_path / "theirs"), weights(tmp_path / "ours")


def agree(theirs, ours, but=()):
    assert theirs.keys() == ours.keys()
    worst = 0.0
    for name, tensor in theirs.items():
        if name not in but:
            worst = max(worst, float((ours[name] - tensor).abs().max()))
            torch.testing.assert_close(ours[name], tensor, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    print(f"largest deviation {worst:.2e}")


CASES = {
    "frankenmerge": """
merge_method: passthrough
slices:
- sources: [{model: A, layer_range: [0, 3]}]
- sources: [{model: B, layer_range: [1, 4]}]
- sources: [{model: A, layer_range: [2, 4]}]
dtype: float32
""",
    "per slice and source": """
merge_method: linear
parameters: {weight: 0.7}
slices:
- sources:
  - {model: A, layer_range: [0, 3], parameters: {weight: [{filter: mlp, value: [0.1, 0.9]}, {value: 0.4}]}}
  - {model: B, layer_range: [1, 4]}
  parameters: {weight: [{filter: self_attn, value: [1.0, 0.5, 0.25]}, {filter: layernorm, value: 0.3}]}
- sources:
  - {model: A, layer_range: [3, 4]}
  - {model: B, layer_range: [0, 1], parameters: {weight: [{filter: layers, value: [0.2, 0.6]}, {value: 0.4}]}}
""",
    "ties with a base among the sources": """
merge_method: ties
base_model: C
parameters: {density: 0.5, weight: [{filter: layers, value: [0.3, 1.0]}, {value: 0.6}]}
slices:
- sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}, {model: C, layer_range: [0, 2]}]
- sources: [{model: C, layer_range: [2, 4]}, {model: B, layer_range: [1, 3]}, {model: A, layer_range: [2, 4]}]
  parameters: {normalize: false}
""",
    "slerp": """
merge_method: slerp
base_model: A
slices:
- sources: [{model: A, layer_range: [0, 4]}, {model: B, layer_range: [0, 4]}]
parameters:
  t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0]}, {value: 0.5}]
""",
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_slices_give_the_same_checkpoint(models, tmp_path, case):
    theirs, ours = both(models, tmp_path, CASES[case])
    agree(theirs, ours)
    depth = {path: config(tmp_path / path)["num_hidden_layers"] for path in ("theirs", "ours")}
    assert depth["theirs"] == depth["ours"]


FEWER = """
merge_method: linear
parameters: {weight: 0.5}
slices:
- sources: [{model: A, layer_range: [0, 2]}]
- sources: [{model: A, layer_range: [2, 4]}, {model: B, layer_range: [2, 4]}]
"""


def test_where_the_first_slice_has_fewer_sources_mergekit_takes_the_head_of_one(models, tmp_path):
    theirs, ours = both(models, tmp_path, FEWER)
    agree(theirs, ours, but=(*AFTER, "model.embed_tokens.weight"))
    a, b = weights(models / "A"), weights(models / "B")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(theirs[name], a[name])  # the documented difference
        torch.testing.assert_close(ours[name], (a[name] + b[name]) / 2)


STAGES = """
name: first
merge_method: linear
models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 3}}]
---
merge_method: task_arithmetic
base_model: C
models: [{model: first, parameters: {weight: 0.5}}, {model: B, parameters: {weight: 0.25}}]
"""


def test_the_same_stages_give_the_same_checkpoint(models, tmp_path):
    agree(*both(models, tmp_path, STAGES, program="mergekit-multi"))


MODULES = """
merge_method: linear
modules:
  model.language_model.layers: {models: [{model: A, parameters: {weight: [0.1, 0.7]}}, {model: B}]}
  model.vision_tower.encoder.layers:
    models: [{model: A, parameters: {weight: [{filter: mlp, value: [0.2, 0.3, 0.9]}, {value: 0.4}]}}, {model: B}]
  default: {models: [{model: A}, {model: B}]}
parameters: {weight: 0.5}
"""


def test_the_same_modules_give_the_same_towers(tmp_path):
    """Under other names; and mergekit's output has nothing of the language model, which is no way to agree with."""
    for seed, name in enumerate("ABC"):
        any_saved("llava", tmp_path / name, seed)
    theirs, ours = both(tmp_path, tmp_path, MODULES)
    vision = {name.removeprefix("model."): tensor for name, tensor in theirs.items()}
    assert not any(name.startswith("language_model") for name in vision)
    assert {name for name in ours if not name.startswith("language_model")} == vision.keys()
    outside = [name for name in vision if ".layers." not in name and "projector" not in name]
    agree(vision, {name: ours[name] for name in vision}, but=outside)  # mergekit's `default`, and with us the tower's
