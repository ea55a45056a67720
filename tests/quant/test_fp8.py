"""FP8 from the command line: by definition, opened in transformers, beside llm-compressor's own output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantization_definitions import lists
from safetensors.torch import load_file
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quant.fp8 import fp8, stored_scales
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.formats.fp8 import SCHEMES, Blocks, decode
from wtool.loading import load_model, quiet

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
IDS = torch.arange(40)[None] * 7 % 320
RECORDED = Path(__file__).parent / "recorded" / "llm_compressor_fp8.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama(**WIDE).bfloat16(), tmp_path_factory.mktemp("model") / "llama")


def quantize(model: Path, out: Path, *options: str) -> Path:
    assert run(["quantize", str(model), "-o", str(out), "--quiet", *options]) == 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [Blocks(-1, -1), Blocks(1, -1), Blocks(2, 4)], ids=str)
def test_the_largest_weight_of_a_block_lands_on_the_largest_code(blocks: Blocks, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    codes, scales = fp8(weight, blocks, scale_dtype=dtype)
    assert scales.dtype == dtype and (scales > 0).all() and not codes.float().isnan().any()
    height, width = blocks.size((5, 10))
    for a, row in enumerate(lists(scales)):
        for b, scale in enumerate(row):
            here = slice(a * height, (a + 1) * height), slice(b * width, (b + 1) * width)
            largest = float(weight[here].abs().max())
            assert scale == pytest.approx(largest / 448 or 1, rel=2**-7)
            assert float(codes[here].float().abs().max()) == (448 if largest else 0)
    off = (decode(codes, scales, blocks) - weight.float()).abs()
    far = (
        weight.float().abs() / 16 * 1.001 + scales.float().max() * 2**-10
    )  # half a step of the mantissa, or of the lowest
    assert (off <= torch.maximum(far, weight.float().abs() * 2**-7)).all()


def test_scales_that_the_type_of_a_model_hardly_holds() -> None:
    largest = torch.tensor([[0.0, 1e-9, 1e-4, 0.02, 1.0]])
    scales = stored_scales(largest, torch.float16)
    assert scales[0, 0] == 1 and (scales[0, 1:].float() >= 2.0**-14).all()
    assert (largest[0, 1:] / scales[0, 1:].float() <= 448 * 1.001).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_transformers_decodes_and_computes_the_same(model: Path, tmp_path: Path, scheme: str, capsys) -> None:
    out = quantize(model, tmp_path / "out", "--scheme", scheme)
    ours = load_model(open_checkpoint(str(out)), dtype="BF16")
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True))
        computed = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    whole = AutoModelForCausalLM.from_pretrained(model)(IDS).logits.float()
    far = [
        float((logits.float() - whole).norm() / whole.norm()) for logits in (theirs(IDS).logits, computed(IDS).logits)
    ]
    assert 0 < far[0] < 0.5 and 0 < far[1] < 0.5  # random numbers are 1.4 away; activations are in FP8 too


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-tensor"])
def test_the_format_of_transformers_own(model: Path, tmp_path: Path, scheme: str) -> None:
    out = quantize(model, tmp_path / "out", "--scheme", scheme, "--format", "fp8")
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored[f"{name}_scale_inv"].shape == ((1, 2) if scheme == "fp8-block" else ())
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert torch.equal(load_model(open_checkpoint(str(out)), dtype="BF16")(IDS).logits, theirs(IDS).logits)


def test_what_is_written_is_read_by_every_verb(model: Path, tmp_path: Path) -> None:
    first = quantize(model, tmp_path / "fp8", "--scheme", "fp8-dynamic")
    again = quantize(first, tmp_path / "again", "--scheme", "fp8-dynamic")
    one, two = load_file(first / "model.safetensors"), load_file(again / "model.safetensors")
    assert set(one) == set(two)
    same = [torch.equal(one[name].float(), two[name].float()) for name in one]
    assert all(same)  # codes on their own grid stay where they are
    quantize(first, tmp_path / "int4", "--method", "rtn", "--bits", "4", "--group-size", "64")
    assert run(["prune", str(first), "-m", "magnitude", "--sparsity", "0.5", "-o", str(tmp_path / "p"), "--quiet"]) == 0
    for folder, kept in (("int4", "pack-quantized"), ("p", None)):
        settings = json.loads((tmp_path / folder / "config.json").read_text()).get("quantization_config", {})
        assert settings.get("format") == kept
        load_model(open_checkpoint(str(tmp_path / folder)), dtype="F32")


def test_ignored_modules_stay_and_are_named(model: Path, tmp_path: Path) -> None:
    out = quantize(model, tmp_path / "out", "--scheme", "fp8-block", "--ignore", "down_proj")
    stored = load_file(out / "model.safetensors")
    kinds = {
        name.rpartition(".")[0].rpartition(".")[2]: t.dtype
        for name, t in stored.items()
        if name.endswith("proj.weight")
    }
    assert kinds.pop("down_proj") == torch.bfloat16 and set(kinds.values()) == {torch.float8_e4m3fn}
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(settings["ignore"]) == {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))}


def test_names_types_and_settings_are_llm_compressors(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())
    model = saved(llama(**recorded["model"]).bfloat16(), tmp_path / "model")
    for scheme, preset in (("fp8-dynamic", "FP8_DYNAMIC"), ("fp8-block", "FP8_BLOCK")):
        out = quantize(model, tmp_path / scheme, "--scheme", scheme)
        tensors = load_file(out / "model.safetensors")
        told = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        assert told == recorded[preset]["tensors"]
        ours = json.loads((out / "config.json").read_text())["quantization_config"]
        assert covers(recorded[preset]["quantization_config"], ours) == []


def covers(theirs: object, ours: object, place: str = "") -> list[str]:
    """Where settings differ; what is null there may be missing, versions and observers say nothing of the weights."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = set(theirs) | set(ours)
        found = [covers(theirs.get(key), ours.get(key), f"{place}.{key}") for key in sorted(keys)]
        return [each for part in found for each in part]
    unsaid = place.endswith((".version", ".observer", ".observer_kwargs"))
    return [] if unsaid or theirs == ours else [f"{place}: {theirs} {ours}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "fp8-dynmic"], "no scheme 'fp8-dynmic'; did you mean 'fp8-dynamic'?"),
        (["--scheme", "fp8-block", "--bits", "4"], "'bits' does not go with the scheme fp8-block"),
        (["--scheme", "fp8-block", "--method", "gptq"], "goes with the method rtn, not with gptq"),
        (["--scheme", "fp8-block", "--format", "awq"], "goes with the formats compressed-tensors and fp8, not awq"),
        (
            ["--scheme", "fp8-dynamic", "--format", "fp8"],
            "the format fp8 has no scales for rows: take the scheme fp8-block",
        ),
        (["--scheme", "fp8-block", "--ignore", "proj"], "no linear layer is left to quantize"),
    ],
)
def test_what_cannot_be_meant(model: Path, tmp_path: Path, options: list[str], message: str, capsys) -> None:
    assert run(["quantize", str(model), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_what_runtimes_cannot_compute_is_told_before(tmp_path: Path, capsys) -> None:
    model = str(saved(llama(hidden_size=192, intermediate_size=320).bfloat16(), tmp_path / "model"))
    for target, options, told in [
        ("vllm", [], "vllm: 'model.layers.0.self_attn.k_proj' has 192 inputs, which groups of 128 do not divide"),
        ("autogptq", [], "autogptq does not read FP8 (it reads gptq)"),
        (
            "vllm",
            ["--format", "fp8"],
            "blocks of 128 x 128 do not divide its 192, as fp8 asks: take compressed-tensors",
        ),
    ]:
        code = run(["quantize", model, "--scheme", "fp8-block", "--target", target, "--dry-run", *options])
        assert code == 3 and told in capsys.readouterr().out
    assert run(["quantize", model, "--scheme", "fp8-dynamic", "--target", "vllm", "--dry-run"]) == 0
    assert run(["quantize", model, "--scheme", "fp8-block", "--dry-run"]) == 0
    assert "groups of 128 do not divide the inputs of 14 layer(s)" in capsys.readouterr().out


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, capsys) -> None:
    network = llama()
    network.get_parameter("model.layers.0.mlp.up_proj.weight").data[3, 4] = float("nan")
    model = saved(network, tmp_path / "model")
    assert run(["quantize", str(model), "--scheme", "fp8-dynamic", "-o", str(tmp_path / "out")]) == 5
    assert "tensor 'model.layers.0.mlp.up_proj.weight' has nan at element 100" in capsys.readouterr().err


STEP = """
import sys
from pathlib import Path
from quant.recipe import parse_recipe
from quant.run import plan_asked
from wtool.memory import give_back_freed_memory

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

plan = plan_asked(parse_recipe({"model": sys.argv[1], "method": "rtn", **eval(sys.argv[2])}, "test")).plan
steps = {step.reads[0][1]: step for step in plan.steps}
for part in ("k_proj", "up_proj"):
    name = next(name for name in steps if part in name)
    weight = plan.sources[0].read(name).clone()
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the most held is counted from here
    before = status("VmRSS")
    steps[name].function(weight)
print((status("VmHWM") - before) / weight.numel())
"""


@pytest.mark.parametrize("recipe", [{"bits": 4}, {"bits": 3, "symmetric": False}, {"scheme": "fp8-block"}], ids=str)
def test_a_step_takes_few_bytes_a_weight(tmp_path: Path, recipe: dict[str, object]) -> None:
    """A byte of codes, what is packed, and some megabytes; matrix, scales and quotient in float32 would be 12."""
    model = saved(
        llama(hidden_size=1024, intermediate_size=16384, num_hidden_layers=1, num_key_value_heads=1).bfloat16(),
        tmp_path / "model",
    )
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(model), repr(recipe)], capture_output=True, text=True, check=True
    )
    assert 0.5 < float(done.stdout) < 6
