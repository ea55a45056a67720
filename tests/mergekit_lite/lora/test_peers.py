"""Beside mergekit-extract-lora 0.1.5: the same two models, the same updates.

Needs mergekit in the environment (pip install 'wtool[peers]'), or in another one whose python WTOOL_MERGEKIT_PYTHON
names.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from lora_adapters import deltas, in_peft
from safetensors.torch import load_file
from tiny_models import llama, saved

from wtool.cli import run

PYTHON = os.environ.get("WTOOL_MERGEKIT_PYTHON") or (sys.executable if importlib.util.find_spec("mergekit") else None)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(PYTHON is None, reason="mergekit is not here: pip install mergekit==0.1.5"),
]


def test_extracts_what_mergekit_extracts(tmp_path):
    base, tuned, theirs, ours = (tmp_path / name for name in ("base", "tuned", "theirs", "ours"))
    model = llama()
    saved(model, base)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    saved(model, tuned)
    command = [str(PYTHON), "-m", "mergekit.scripts.extract_lora", "--model", str(tuned), "--base-model", str(base)]
    command += ["--out-path", str(theirs), "--max-rank", "4", "--skip-undecomposable", "-e", "embed_tokens|lm_head"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    flags = ["--rank", "4", "--exclude", "embed_tokens|lm_head"]
    assert run(["extract-lora", str(tuned), "--base", str(base), "-o", str(ours), *flags]) == 0
    found = deltas(in_peft(base, ours))
    held = load_file(theirs / "adapter_model.safetensors")
    largest = 0.0
    for module, delta in found.items():
        a, b = (held[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        torch.testing.assert_close(delta, b @ a, rtol=1e-4, atol=1e-5, msg=module)
        largest = max(largest, float((delta - b @ a).abs().max()))
    print(f"largest deviation {largest:.2e}")
    assert sum(name.endswith("lora_A.weight") for name in held) == len(found)
