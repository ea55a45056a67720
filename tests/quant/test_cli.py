"""`wtool quantize` as a user runs it, on tiny models, opened again in transformers through compressed-tensors."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from families import FAMILIES, saved_family
from hub_server import HubServer
from killing import contents
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.grid import Grid, encode, fit
from wtool.loading import load_model, quiet

CALIBRATION = ["--samples", "8", "--seqlen", "48"]
LINEARS = 7  # in a layer of a llama
Quantize = Callable[..., Path]


@pytest.fixture
def quantize(text: Path, tmp_path: Path) -> Quantize:
    """Quantize with the calibration text and groups of 32; the output's folder."""

    def go(model: Path, *flags: str, name: str = "out") -> Path:
        out = tmp_path / name
        calibration = [] if "rtn" in flags or "--stats" in flags else ["--calib", str(text), *CALIBRATION]
        groups = [] if "-g" in flags else ["-g", "32"]
        assert run(["quantize", str(model), *groups, *calibration, *flags, "-o", str(out), "--quiet"]) == 0
        return out

    return go


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_text())


def own_logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)), dtype="F32")(input_ids=ids).logits


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", ["--symmetric", "--asymmetric"])
def test_transformers_reads_what_was_written(model: Path, quantize: Quantize, bits: int, kind: str) -> None:
    out = quantize(model, "-b", str(bits), kind, "--dtype", "float32")
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids()).logits
    torch.testing.assert_close(own_logits(out, ids()), theirs, rtol=1e-4, atol=1e-4)


def test_every_tensor_is_there_and_what_is_not_quantized_is_as_it_was(model: Path, quantize: Quantize) -> None:
    before, after = load_file(model / "model.safetensors"), load_file(quantize(model) / "model.safetensors")
    for name, tensor in before.items():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            assert name not in after
            assert {f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_shape"} <= after.keys()
        else:
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    quantized = sum("_proj" in name for name in before)
    assert quantized == 3 * LINEARS
    assert len(after) == len(before) + 2 * quantized


def test_gptq_is_nearer_to_the_model_than_rounding_and_more_bits_are_nearer(model: Path, quantize: Quantize) -> None:
    written = tokenizer()(topics["try"] + topics["with"])["input_ids"]
    text = torch.tensor([written[i * 48 : (i + 1) * 48] for i in range(20)])
    full = own_logits(model, text).log_softmax(-1)

    def divergence(*flags: str) -> float:
        ours = own_logits(quantize(model, *flags, name="-".join(flags)), text).log_softmax(-1)
        return float((full.exp() * (full - ours)).sum(-1).mean())

    rounded, three, four = divergence("-b", "3", "-m", "rtn"), divergence("-b", "3"), divergence("-b", "4")
    assert four < three < 0.8 * rounded


def test_the_report_tells_of_every_linear(model: Path, quantize: Quantize) -> None:
    told = manifest(quantize(model, "-b", "3"))
    assert len(told["report"]) == 3 * LINEARS
    for entry in told["report"].values():
        assert entry["bits"] == 3 and entry["tokens"] == 8 * 48
        assert 0 < entry["output_error"] < entry["rtn_output_error"] < 1
        assert entry["damping"] == 0.01 and "fallback" not in entry
    assert set(told["left"]) == {"model.embed_tokens.weight", "lm_head.weight"} & set(told["left"])
    assert told["summary"]["layers"] == 3 * LINEARS
    assert told["recipe"]["calibration"]["samples"] == 8


def test_gptaq_aims_at_the_outputs_of_before(model: Path, quantize: Quantize) -> None:
    gptq, gptaq = quantize(model, "-b", "3", name="gptq"), quantize(model, "-b", "3", "-m", "gptaq", name="gptaq")
    ours, theirs = load_file(gptq / "model.safetensors"), load_file(gptaq / "model.safetensors")
    first = "model.layers.0.self_attn.q_proj.weight_packed"  # fed what it was always fed
    assert torch.equal(ours[first], theirs[first])
    assert not torch.equal(ours[first.replace("layers.0", "layers.2")], theirs[first.replace("layers.0", "layers.2")])
    assert manifest(gptaq)["recipe"]["quantize"]["method"] == "gptaq"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--no-sequential"], "gptaq is sequential: leave out 'way: one-pass' (--no-sequential), or take gptq"),
        (["--stats", "stats"], "gptaq looks at the model itself, so statistics do not do: give calibration text"),
    ],
)
def test_what_gptaq_cannot_do_is_refused(
    model: Path, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(model), "-m", "gptaq", *flags, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip() == f"error: {said}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_other_formats_hold_the_same_matrices(model: Path, quantize: Quantize, form: str) -> None:
    flags = ["--dtype", "float16"]  # of the scales, in both formats
    packed, other = quantize(model, *flags, name="ct"), quantize(model, *flags, "-f", form)
    assert (other / "quantize_config.json").exists()
    ours, theirs = open_checkpoint(str(packed)), open_checkpoint(str(other))
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        assert torch.equal(ours.read(name).float(), theirs.read(name).float()), name


def test_act_order_with_dynamic_groups_is_told_by_g_idx(model: Path, quantize: Quantize) -> None:
    out = quantize(model, "-f", "gptq", "--no-static-groups")
    index = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert not torch.equal(index, torch.arange(96, dtype=torch.int32) // 32)
    assert index.bincount().tolist() == [32, 32, 32]
    assert json.loads((out / "quantize_config.json").read_text())["desc_act"] is True
    assert own_logits(out, ids()).isfinite().all()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("bert",)])
def test_every_family_is_quantized_and_runs(name: str, quantize: Quantize, tmp_path: Path) -> None:
    source = tmp_path / "model"
    before = saved_family(name, source)
    out = quantize(source, "-b", "8", "-g", "16", "-f", "gptq_v2")  # fits all shapes of tiny models
    told = manifest(out)
    assert told["summary"]["layers"] == len(told["report"])
    with torch.no_grad():
        full = before(input_ids=ids()).logits.log_softmax(-1)
    ours = own_logits(out, ids()).log_softmax(-1)
    assert float((full.exp() * (full - ours)).sum(-1).mean()) < 0.05


def test_experts_keep_their_names_and_one_without_tokens_is_told(quantize: Quantize, tmp_path: Path) -> None:
    source = tmp_path / "model"
    saved_family("mixtral", source, num_local_experts=32)
    out = quantize(source, "-g", "16")
    told = manifest(out)["report"]
    experts = {name: entry for name, entry in told.items() if "experts" in name}
    assert len(experts) == 2 * 32 * 3
    assert "model.layers.0.block_sparse_moe.experts.31.w2.weight_packed" in load_file(out / "model.safetensors")
    reasons = {entry.get("fallback", "").split(" ")[0] for entry in experts.values()}
    assert {"", "no", "only"} & reasons == reasons and len(reasons) > 1
    assert all(entry["tokens"] >= 32 for entry in experts.values() if "fallback" not in entry)


def test_two_runs_give_the_same_bytes(model: Path, quantize: Quantize) -> None:
    assert contents(quantize(model, name="a")) == contents(quantize(model, name="b"))


def test_what_is_there_is_not_done_again(model: Path, quantize: Quantize, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(model)
    stamp = (quantize(model) / "model.safetensors").stat().st_mtime_ns
    assert "there already" in capsys.readouterr().out
    assert (quantize(model, "--force") / "model.safetensors").stat().st_mtime_ns != stamp


def test_rounding_streams_without_a_model(model: Path, quantize: Quantize) -> None:
    out = quantize(model, "-m", "rtn", "--no-clip")
    ours, stored = open_checkpoint(str(out)), load_file(model / "model.safetensors")
    grid = Grid(4, 32)
    for name, weight in stored.items():
        if "_proj" in name:
            scales, _ = fit(weight, grid, dtype=torch.bfloat16)
            index = grid.group_index(weight.shape[1])
            codes = encode(weight, scales, None, index, grid)
            assert torch.equal(ours.read(name), codes.float() * scales.float()[:, index])


def checksum(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("lifted", [True, False])
def test_statistics_gathered_once_serve_any_quantization(
    model: Path, text: Path, quantize: Quantize, tmp_path: Path, capsys: pytest.CaptureFixture[str], lifted: bool
) -> None:
    """Lifted or not, both give for the first layer what the text gives; the other kind is warned of."""
    stats = tmp_path / "stats"
    lift = ["--lift"] if lifted else []
    assert run(["calibrate", str(model), "--calib", str(text), *CALIBRATION, *lift, "-o", str(stats), "--quiet"]) == 0
    same, other = ("--lift", "--no-lift") if lifted else ("--no-lift", "--lift")
    from_stats = quantize(model, "--stats", str(stats), same, name="from")
    assert "lifted" not in capsys.readouterr().err
    walked = quantize(model, "--no-sequential", same, name="walked")
    assert run(["quantize", str(model), "-g", "32", "--stats", str(stats), other, "--dry-run"]) == 0
    told = "are of lifted tokens" if lifted else "count all tokens alike"
    assert f"{stats}: these statistics {told}" in capsys.readouterr().out
    otherwise = quantize(model, "--no-sequential", other, name="otherwise")
    assert load_file(otherwise / "model.safetensors").keys() == load_file(walked / "model.safetensors").keys()
    assert checksum(otherwise) != checksum(walked)
    ours, theirs = load_file(from_stats / "model.safetensors"), load_file(walked / "model.safetensors")
    assert ours.keys() == theirs.keys()
    first = [name for name in ours if name.startswith("model.layers.0.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in first)  # before anything was changed
    assert any(
        not torch.equal(ours[name], theirs[name]) for name in ours
    )  # later layers saw what the changed ones give
    report = manifest(from_stats)["report"]
    assert all(entry["output_error"] < entry["rtn_output_error"] for entry in report.values())


def test_statistics_of_another_model_are_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved(llama(hidden_size=64, intermediate_size=96), tmp_path / "other")
    stats = tmp_path / "stats"
    assert run(["calibrate", str(other), "--calib", str(text), *CALIBRATION, "-o", str(stats), "--quiet"]) == 0
    capsys.readouterr()
    assert run(["quantize", str(model), "-g", "32", "--stats", str(stats), "-o", str(tmp_path / "out")]) == 3
    assert "these statistics are of" in capsys.readouterr().err


def test_modules_can_be_left_out_or_have_other_bits(model: Path, quantize: Quantize) -> None:
    out = quantize(model, "--ignore", "layers.0.", "--layer-bits", "down_proj=8")
    told = manifest(out)
    assert len(told["report"]) == 2 * LINEARS
    assert {name.split(".")[-1] for name, entry in told["report"].items() if entry["bits"] == 8} == {"down_proj"}
    assert told["left"]["model.layers.0.mlp.up_proj.weight"] == "ignored, as asked"
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids()).logits
    torch.testing.assert_close(own_logits(out, ids()), theirs, rtol=2e-2, atol=2e-2)


def test_a_quantized_checkpoint_is_quantized_again_with_a_warning(
    model: Path, quantize: Quantize, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = quantize(model, "-b", "8", name="eight")
    four = quantize(eight, "-b", "4", name="four")
    assert "is quantized already" in capsys.readouterr().err
    assert own_logits(four, ids()).isfinite().all()


def test_a_layer_beyond_the_model_s_is_copied(model: Path, quantize: Quantize, tmp_path: Path) -> None:
    source = tmp_path / "mtp"
    made = llama(num_hidden_layers=3, hidden_size=64, intermediate_size=96)
    saved(made, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    out = quantize(source)
    stored = load_file(out / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(stored[name], made.state_dict()[name])
    assert "multi-token prediction" in manifest(out)["left"][name]


def test_a_plan_is_shown_from_headers_alone(hub: HubServer, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/name", model)
    assert run(["quantize", "org/name", "-g", "32", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "21 linear layers" in shown and "no problem found" in shown


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["-m", "gtpq"], 2, "no quantization method 'gtpq'; did you mean 'gptq'?"),
        (["-b", "7"], 2, "bits is 7; there are 2, 3, 4, 5, 6, 8"),
        (["-g", "0"], 2, "group size is 0"),
        (["-f", "gptq3"], 2, "no format 'gptq3'; did you mean 'gptq'"),
        (["--layer-bits", "down_proj"], 2, "write FILTER=BITS"),
        (["--ignore", "re:("], 2, "not a regular expression"),
        (["--ignore", "layers"], 2, "no linear layer is left to quantize"),
        (["--calib", "nowhere.txt"], 3, "nowhere.txt: no such"),
        (["--stats", "nowhere"], 3, "no statistics here"),
        (["--activations", "gpu"], 2, "take device, cpu or disk"),
        (["-g", "48"], 3, "groups of 48 do not divide its 64 inputs"),
        (["-f", "gptq", "--asymmetric"], 3, "symmetric"),
        (["-f", "gptq", "-b", "5"], 3, "5"),
        (["--target", "vllm", "-b", "3"], 3, "vllm: 'model.layers.0"),
        (["--target", "vllm", "--layer-bits", "k_proj=8"], 3, "are computed as one, but are not stored alike"),
        (["--target", "vllm", "--tensor-parallel", "4"], 3, "do not divide on each of 4 devices"),
        (["--target", "autogptq"], 3, "autogptq does not read compressed-tensors"),
        (
            ["--target", "transformers", "--asymmetric", "-b", "3.5"],
            2,
            "transformers opens only --symmetric ones",
        ),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    groups = [] if "-g" in flags else ["-g", "32"]
    out = tmp_path / "out"
    assert run(["quantize", str(model), *groups, *flags, "-o", str(out), "--quiet"]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("scheme", [["-g", "32"], ["--scheme", "fp8-dynamic"]], ids=["int4", "fp8"])
def test_a_conv1d_that_transformers_would_not_fill_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: list[str]
) -> None:
    saved_family("gpt2", tmp_path / "gpt2")
    plan = ["quantize", str(tmp_path / "gpt2"), "-m", "rtn", *scheme, "--dry-run"]
    assert run(plan) == 0
    told = "'transformer.h.0.attn.c_attn' is a Conv1D, and transformers opens a quantized one with random weights"
    assert f"warning: {told}" in capsys.readouterr().out
    assert run([*plan, "--target", "transformers"]) == 3
    assert f"transformers: {told}" in capsys.readouterr().out


ZEROS = "'model.layers.0.mlp.experts.0.down_proj' is an expert with zeros"
OTHERS = "'model.layers.0.mlp.experts.0.gate_proj' is an expert of another grid than the first"
MIXED = "'model.layers.0.mlp.down_proj' has zeros, and transformers does not open these where layers have several grids"
UNLIKE = "and 'model.layers.0.mlp.experts.0.down_proj' are experts of one block, but are not stored alike"


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("qwen3_moe", ["--asymmetric"], {"transformers": ZEROS}),
        ("qwen3_moe", ["--layer-bits", "down_proj=8"], {"transformers": OTHERS, "vllm": UNLIKE}),
        ("llama", ["--asymmetric", "--layer-bits", "down_proj=8"], {"transformers": MIXED}),
        ("qwen3_moe", ["--layer-bits", "self_attn=8"], {}),
    ],
)
def test_grids_that_runtimes_do_not_open_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, flags: list[str], told: dict[str, str]
) -> None:
    saved_family(name, tmp_path / "model")
    plan = ["quantize", str(tmp_path / "model"), "-m", "rtn", "-g", "8", *flags, "--dry-run"]
    assert run(plan) == 0
    warned = capsys.readouterr().out
    assert (f"warning: {told['transformers']}" in warned) if told else "transformers" not in warned
    for target in ("transformers", "vllm"):
        assert run([*plan, "--target", target]) == (3 if target in told else 0)
        found = capsys.readouterr().out
        assert target not in told or told[target] in found


def test_experts_of_a_grid_of_their_own_open_in_transformers(tmp_path: Path) -> None:
    """It decodes all experts by the first of the configuration's groups, whatever that names."""
    saved_family("deepseek_v3", tmp_path / "model")
    out = tmp_path / "out"
    grids = ["-g", "-1", "--layer-bits", "experts.=8", "--dtype", "float32"]
    assert run(["quantize", str(tmp_path / "model"), "-m", "rtn", *grids, "-o", str(out), "--quiet"]) == 0
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids()).logits
    torch.testing.assert_close(own_logits(out, ids()), theirs, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "broken"
    shutil.copytree(model, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    command = ["quantize", str(source), "-g", "32", "--calib", str(text), *CALIBRATION, "-o", str(out), "--quiet"]
    assert run(command) == 5
    assert "tensor 'model.layers.1.mlp.up_proj.weight' has nan at element 5" in capsys.readouterr().err
    assert not out.exists()
