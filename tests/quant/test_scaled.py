"""AWQ's scales on the walk: the scaled model computes what the model did, and what is written is what was run."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved_family
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.calibrated import Quantizing
from quant.planner import plan_quantize
from quant.recipe import QuantRecipe
from quant.scaled import NOTHING, ScaledRewriting
from wtool import calibrate
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.loading import load_model, quiet

CALIBRATION = ["--samples", "8", "--seqlen", "48"]
Awq = Callable[..., Path]


@pytest.fixture
def awq(text: Path, tmp_path: Path) -> Awq:
    """Quantize by AWQ; the output's folder."""

    def go(model: Path, *flags: str, name: str = "out") -> Path:
        method = [] if "-m" in flags else ["-m", "awq"]
        arguments = [*method, *flags, "--calib", str(text), *CALIBRATION, "-o", str(tmp_path / name), "--quiet"]
        assert run(["quantize", str(model), *arguments]) == 0
        return tmp_path / name

    return go


class Kept:
    """Written tensors, in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    @property
    def done(self) -> Mapping[str, str]:
        return {}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def write(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        self.tensors |= tensors


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)), dtype="F32")(input_ids=ids()).logits


def divergence(before: Tensor, after: Tensor) -> float:
    full = before.log_softmax(-1)
    return float((full.exp() * (full - after.log_softmax(-1))).sum(-1).mean())


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_text())["report"]


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "gemma3_text", "mixtral", "phi3", "gpt2", "opt", "olmo2", "qwen3_moe", "deepseek_v3"],
)
def test_the_scaled_model_computes_what_the_model_did(name: str, tmp_path: Path) -> None:
    before = saved_family(name, tmp_path / "model")
    recipe = QuantRecipe(model=str(tmp_path / "model"), method="awq", bits=2, group_size=8)
    plan = plan_quantize(recipe)
    source = plan.plan.sources[0]
    network = calibrate.network(source, calibrate.Where(dtype="F32"))
    windows = list(torch.randint(3, 300, (4, 48), generator=torch.Generator().manual_seed(1)))
    transposed = {tensor for tensor, layer in plan.layers.items() if layer.linear.transposed}
    with ScaledRewriting(Quantizing(recipe, plan), network, Kept(), transposed) as visitor:
        calibrate.walk(network, windows, visitor)
        visitor.finish(plan.layers)
        scaled = {tensor: visitor.scaled_tensor(tensor).contiguous() for tensor in source.tensors}
    changed = {tensor for tensor, value in scaled.items() if not torch.equal(value, source.read(tensor))}
    assert len(changed) > len(plan.layers) / 2
    save_file(scaled, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        expected = before(input_ids=ids()).logits
    torch.testing.assert_close(logits(tmp_path / "model"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "mixtral", "phi3", "gpt2", "deepseek_v3"])
def test_every_family_is_quantized_and_runs(name: str, awq: Awq, tmp_path: Path) -> None:
    saved_family(name, tmp_path / "model")
    before = logits(tmp_path / "model")
    out = awq(tmp_path / "model", "-b", "8", "-g", "8")
    assert divergence(before, logits(out)) < 0.05


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_transformers_reads_what_was_written(model: Path, awq: Awq, method: str) -> None:
    out = awq(model, "-m", method, "-g", "32", "--dtype", "float32")
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids()).logits
    torch.testing.assert_close(logits(out), theirs, rtol=1e-4, atol=1e-4)


def test_scales_bring_outputs_nearer_than_rounding_alone(model: Path, awq: Awq) -> None:
    told = report(awq(model, "-b", "3", "-g", "32"))
    assert len(told) == 21
    scaled = {name: entry["scaled"] for name, entry in told.items()}
    assert scaled["model.layers.0.self_attn.q_proj"]["by"] == "model.layers.0.input_layernorm.weight"
    assert scaled["model.layers.0.self_attn.o_proj"]["by"] == "model.layers.0.self_attn.v_proj.weight"
    assert scaled["model.layers.0.mlp.down_proj"]["by"] == "model.layers.0.mlp.up_proj.weight"
    assert all(0 < entry["error_share"] <= 1 for entry in scaled.values())
    assert sum(entry["error_share"] < 1 for entry in scaled.values()) > 10
    assert all(0 < entry["output_error"] < 1 for entry in told.values())


def test_every_scale_ends_at_its_best_for_the_codes(model: Path, awq: Awq, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-b", "3", "-g", "32", "--no-sequential"]  # the first block's inputs are the same in both runs
    fitted = report(awq(model, *flags, name="fitted"))
    monkeypatch.setattr("quant.matrix.refit_scales", lambda weight, gram, added, found: found)
    plain = report(awq(model, *flags, name="plain"))
    first = [name for name in plain if ".layers.0." in name]
    assert len(first) == 7
    assert all(fitted[name]["output_error"] < plain[name]["output_error"] for name in first)


def test_where_nothing_takes_a_scale_the_report_says_so(awq: Awq, tmp_path: Path) -> None:
    saved_family("gpt2", tmp_path / "model")
    told = report(awq(tmp_path / "model", "-g", "16"))
    left = {name.split(".", 3)[-1] for name, entry in told.items() if entry["scaled"] == NOTHING}
    assert left == {"mlp.c_proj"}


def test_what_is_left_out_is_scaled_with_the_others(model: Path, awq: Awq) -> None:
    """A norm that feeds a layer which stays plain is divided, so the layer is multiplied."""
    before = logits(model)
    out = awq(model, "-b", "8", "-g", "32", "--ignore", "k_proj", "--ignore", "down_proj")
    stored, given = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert stored[name].dtype == given[name].dtype and not torch.equal(stored[name], given[name])
    assert divergence(before, logits(out)) < 0.02
    assert set(open_checkpoint(str(out)).tensors) == set(given)


def test_its_own_format_holds_the_same_matrices(model: Path, awq: Awq) -> None:
    flags = ["-g", "32", "--dtype", "float16"]  # of the scales, in both formats
    packed, other = awq(model, *flags, name="ct"), awq(model, *flags, "-f", "awq")
    ours, theirs = open_checkpoint(str(packed)), open_checkpoint(str(other))
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        assert torch.equal(ours.read(name).float(), theirs.read(name).float()), name


def test_two_runs_give_the_same_bytes(model: Path, awq: Awq) -> None:
    first, second = (awq(model, "-g", "32", "-b", "3", name=name) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["-m", "awq", "--stats", "stats"], 2, "awq looks at the model itself, so statistics do not do"),
        (["-m", "awq", "-f", "awq", "-b", "3"], 3, "awq has codes of 4 bits, not 3"),
        (["-m", "awq", "-f", "awq", "--layer-bits", "down_proj=8"], 3, "awq has codes of 4 bits, not 8"),
        (["-m", "rtn", "-f", "awq", "--target", "autogptq"], 3, "autogptq does not read awq"),
        (["-m", "rtn", "-f", "awq", "--target", "vllm"], 3, "is symmetric; of AWQ it takes grids with zeros"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    flags: list[str], code: int, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(model), "-g", "32", *flags, "-o", str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
