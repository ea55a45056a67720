"""`wtool quantize --rotate` as a user runs it, on tiny models, opened again in transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved_family
from killing import contents
from safetensors.torch import load_file
from tiny_models import llama, saved
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.recipe import parse_recipe
from quant.run import plan_asked
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.errors import UsageError
from wtool.loading import load_model, quiet

CALIBRATION = ["--samples", "4", "--seqlen", "32"]


def quantize(model: Path, text: Path, out: Path, *flags: str) -> Path:
    calibration = [] if {"rtn", "gguf"} & {*flags} else ["--calib", str(text), *CALIBRATION]
    assert run(["quantize", str(model), *flags, *calibration, "-o", str(out), "--quiet"]) == 0
    return out


def logits(folder: Path) -> Tensor:
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)), dtype="F32")(input_ids=ids).logits


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_text())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "signround"])
def test_every_method_goes_after_a_rotation_and_transformers_decodes(
    method: str, model: Path, text: Path, tmp_path: Path
) -> None:
    own = ["--iters", "2"] if method == "signround" else []
    flags = ["-m", method, "-b", "8", "-g", "32", "--symmetric", "--rotate", *own]
    out = quantize(model, text, tmp_path / "out", *flags)
    assert off(logits(out), logits(model)) < 0.1
    with quiet():
        loader: Any = AutoModelForCausalLM
        opened = loader.from_pretrained(out, dtype=torch.float32).eval()
        made = opened.generate(torch.tensor([[3, 5, 9]]), max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert made.shape == (1, 7)
    told = manifest(out)
    assert told["rotation"] == {"residual": "a Hadamard matrix of 64", "values": "a Hadamard matrix of 16"}
    assert told["recipe"]["quantize"]["rotate"] == "residual+values" and len(told["recipe"]["rotation"]) == 64


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3"])
def test_other_families_from_the_command_line(name: str, text: Path, tmp_path: Path) -> None:
    saved_family(name, tmp_path / "model")
    flags = ["-m", "rtn", "-b", "8", "-g", "-1", "--rotate"]
    out = quantize(tmp_path / "model", text, tmp_path / "out", *flags)
    assert off(logits(out), logits(tmp_path / "model")) < 0.2


def test_two_runs_give_the_same_bytes_and_another_seed_others(model: Path, text: Path, tmp_path: Path) -> None:
    flags = ["-m", "gptq", "-g", "32", "--rotate"]
    first, again = (quantize(model, text, tmp_path / name, *flags) for name in ("a", "b"))
    assert contents(first) == contents(again)
    other = quantize(model, text, tmp_path / "c", *flags, "--rotate-seed", "1")
    assert contents(first) != contents(other)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    method: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wtool.rotated import Rotated

    flags = ["-m", method, "-g", "32", "--rotate"]
    expected = contents(quantize(model, text, tmp_path / "straight", *flags))
    read, out = Rotated.read, tmp_path / "out"

    def stops(self: Rotated, name: str) -> Tensor:
        if name.startswith("model.layers.2."):
            raise KeyboardInterrupt
        return read(self, name)

    calibration = [] if method == "rtn" else ["--calib", str(text), *CALIBRATION]
    with monkeypatch.context() as patch:
        patch.setattr(Rotated, "read", stops)
        assert run(["quantize", str(model), *flags, *calibration, "-o", str(out), "--quiet"]) != 0
    assert not out.exists()
    assert contents(quantize(model, text, out, *flags)) == expected


def test_outliers_in_a_few_channels_of_a_row_s_grid_are_turned_away(text: Path, tmp_path: Path) -> None:
    made: Any = llama(hidden_size=64, intermediate_size=96, initializer_range=0.1)
    with torch.no_grad():
        for layer in made.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[5, 40]] = 1 / 30  # which the columns make up for
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[:, [5, 40]] *= 30
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, [5, 40]] *= 30
    model = saved(made, tmp_path / "model")
    flags = ["-m", "rtn", "-b", "4", "-g", "-1"]
    plain = quantize(model, text, tmp_path / "plain", *flags)
    turned = quantize(model, text, tmp_path / "turned", *flags, "--rotate")
    assert off(logits(turned), logits(model)) < 0.7 * off(logits(plain), logits(model))


def test_bits_are_spread_over_the_layers_of_a_rotated_model(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By statistics of it: those that a stopped run left of another rotation are not taken."""
    flags = ["-m", "gptq", "-b", "5.0", "-g", "32", "--rotate"]
    fresh = quantize(model, text, tmp_path / "fresh", *flags, "--rotate-seed", "1")
    told, grids = manifest(fresh), manifest(fresh)["allocation"]["layers"].values()
    assert len({grid["bits"] for grid in grids}) > 1 and told["rotation"]
    assert off(logits(fresh), logits(model)) < 0.2
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("quant.allocate_cli.drop_statistics", lambda output: None)
        quantize(model, text, out, *flags)
    assert manifest(out)["allocation"]["predicted_loss"] != told["allocation"]["predicted_loss"]
    shutil.rmtree(out)
    assert contents(quantize(model, text, out, *flags, "--rotate-seed", "1")) == contents(fresh)


def test_gguf_of_a_rotated_model_decodes_to_the_model(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = quantize(model, text, tmp_path / "out", "-f", "gguf", "-t", "F16", "--rotate")
    (file,) = out.glob("*.gguf")
    assert off(logits(file), logits(model)) < 0.05
    assert manifest(out)["rotation"]["residual"] == "a Hadamard matrix of 64"


def test_a_tied_head_is_told_in_the_plan_and_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(llama(tie_word_embeddings=True, hidden_size=184, num_attention_heads=4), tmp_path / "model")
    assert run(["quantize", str(model), "-m", "rtn", "-g", "-1", "--rotate", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "rotated: residual, by a random orthogonal matrix of 184 (no Hadamard" in shown
    assert "rotated: values, by a random orthogonal matrix of 46" in shown
    assert f"a tensor of its own adds {320 * 184:,} parameters" in shown
    out = quantize(model, text, tmp_path / "out", "-m", "rtn", "-b", "8", "-g", "-1", "--rotate")
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert manifest(out)["summary"]["bytes_before"] == open_checkpoint(str(model)).nbytes
    assert off(logits(out), logits(model)) < 0.2


def test_the_residual_stream_alone_by_a_recipe(model: Path) -> None:
    plan = plan_asked(parse_recipe({"model": str(model), "group_size": 32, "rotate": "residual"}, "here"))
    assert plan.plan.about["rotation"] == {"residual": "a Hadamard matrix of 64"}
    source = plan.plan.sources[0]
    bare = plan_asked(parse_recipe({"model": str(model), "group_size": 32}, "here")).plan
    assert "rotation" not in bare.about and "rotation" not in bare.recipe
    assert not torch.equal(source.read("lm_head.weight"), bare.sources[0].read("lm_head.weight"))


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({"statistics": "s"}, "statistics are of the model as it is, not rotated: give calibration text, or rtn"),
        ({"scheme": "fp8-dynamic"}, "'rotate' does not go with the scheme fp8-dynamic"),
    ],
)
def test_what_does_not_go_with_a_rotation_is_refused(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_recipe({"model": "m", "rotate": "residual", **asked}, "here")


def test_a_family_that_cannot_be_rotated_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_family("gpt2", tmp_path / "gpt2")
    assert run(["quantize", str(tmp_path / "gpt2"), "-m", "rtn", "--rotate", "--dry-run"]) == 2
    assert "a gpt2 cannot be rotated: its norms take out the mean" in capsys.readouterr().err
