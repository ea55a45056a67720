"""Learned rounding from the command line: what is written, what is told of it, and that nothing depends on chance."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved_family
from killing import contents, start
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from wtool import calibrate
from wtool.block_fit import Lesson
from wtool.block_pass import Forward, HiddenStates
from wtool.calibration_data.for_model import windows_for
from wtool.calibration_data.source import CalibrationSource
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.loading import load_model, quiet
from wtool.writer import work_folder

CALIBRATION = ["--samples", "8", "--seqlen", "48"]
BOTH = ["signround", "awq+signround"]
Signround = Callable[..., Path]


@pytest.fixture
def signround(text: Path, tmp_path: Path) -> Signround:
    """Quantize by learned rounding; the output's folder."""

    def go(model: Path, *flags: str, name: str = "out") -> Path:
        method = [] if "-m" in flags else ["-m", "signround"]
        iters = [] if "--iters" in flags else ["--iters", "6"]
        arguments = [*method, *iters, *flags, "--calib", str(text), *CALIBRATION, "-o", str(tmp_path / name), "--quiet"]
        assert run(["quantize", str(model), *arguments]) == 0
        return tmp_path / name

    return go


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)), dtype="F32")(input_ids=ids()).logits


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_text())["report"]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    """Of the blocks, one after another."""
    told = {next(filter(str.isdigit, name.split("."))): entry for name, entry in report(folder).items()}
    return [told[number]["block_loss"] for number in sorted(told)]


def nearest(signround: Signround, model: Path, *flags: str) -> Path:
    """Where learning starts: nothing moves at such a rate."""
    return signround(model, *flags, "--iters", "1", "--lr", "1e-12", name="nearest")


def test_losses_of_blocks_fall_and_are_told(model: Path, signround: Signround) -> None:
    before = losses(nearest(signround, model, "-b", "3", "-g", "32"))
    out = signround(model, "-b", "3", "-g", "32", "--iters", "30")
    after, told = losses(out), report(out)
    assert len(told) == 21 and len({entry["block_loss"] for entry in told.values()}) == 3
    assert all(0 < learned < 0.95 * rounded for rounded, learned in zip(before, after, strict=True))
    assert all(entry["output_error"] < 1 and "not_learned" not in entry for entry in told.values())


def relative_error(outputs: Tensor, targets: Tensor, gains: Tensor) -> float:
    """The mean over tokens of the squared error as a share of what the token is, features times gains, by loops."""
    pairs = [pair for window in zip(outputs, targets, strict=True) for pair in zip(*window, strict=True)]
    shares = [float(((x - t) * gains).square().sum()) / float((t * gains).square().sum()) for x, t in pairs]
    return sum(shares) / len(pairs)


def with_weighted_norms(model: Path, folder: Path) -> Path:
    """A copy whose norms do not let all features through alike."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for tensor in (tensor for name, tensor in tensors.items() if "norm" in name):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", BOTH)
def test_the_loss_told_is_that_of_what_was_written(
    method: str, model: Path, text: Path, signround: Signround, tmp_path: Path
) -> None:
    model = with_weighted_norms(model, tmp_path / "weighted")
    exact = ["--dtype", "float32", "--compute-dtype", "float32"]  # norms that were divided are no bfloat16 numbers
    out = signround(model, "-m", method, "-b", "3", "-g", "32", *exact)
    source = CalibrationSource((str(text),), samples=8, length=48)
    given = open_checkpoint(str(model))
    windows = torch.stack(windows_for(given, source).unpadded())
    norm = given.read("model.layers.1.input_layernorm.weight").float()
    with torch.no_grad():
        loaded = [load_model(open_checkpoint(str(folder)), dtype="F32") for folder in (model, out)]
        exact, ours = (each(input_ids=windows, output_hidden_states=True).hidden_states[1] for each in loaded)
    assert losses(out)[0] == pytest.approx(relative_error(ours, exact, norm), rel=1e-4)


def test_two_runs_give_the_same_bytes(model: Path, signround: Signround) -> None:
    first, second, other = (
        signround(model, "-g", "32", "-b", "3", "--batch", "3", "--seed", seed, name=name)
        for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert weights(first) == weights(second) != weights(other)


@pytest.mark.parametrize("method", BOTH)
def test_a_killed_run_goes_on_to_the_same_bytes(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        learning = ["-m", method, "--iters", "12", "-g", "32", "-b", "3"]
        return ["quantize", str(model), *learning, "--calib", str(text), *CALIBRATION, "-o", str(out)]

    start(command(tmp_path / "straight")).join()
    out = tmp_path / "out"
    process = start(command(out))
    journal = work_folder(out) / "journal"
    while process.is_alive() and not (journal.exists() and b"layers.0." in journal.read_bytes()):
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        process.kill()
    process.join()
    assert not out.exists() and b"layers.2.mlp.down_proj" not in journal.read_bytes()
    again = start(command(out))
    again.join()
    assert again.exitcode == 0
    assert contents(out) == contents(tmp_path / "straight")


def test_where_activations_wait_changes_nothing(model: Path, signround: Signround) -> None:
    first, second = (signround(model, "-g", "32", "--activations", place, name=place) for place in ("cpu", "disk"))
    assert weights(first) == weights(second)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "phi3"])
def test_every_family_is_learned_and_opens_in_transformers(
    name: str, method: str, signround: Signround, tmp_path: Path
) -> None:
    saved_family(name, tmp_path / "model")
    out = signround(tmp_path / "model", "-m", method, "--symmetric", "-g", "8", "-b", "4", "--dtype", "float32")
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids()).logits
    torch.testing.assert_close(logits(out), theirs, rtol=1e-4, atol=1e-4)
    assert all("block_loss" in entry and ("scaled" in entry) == ("awq" in method) for entry in report(out).values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_scales_that_are_learned_after_leave_the_model_what_it_was(
    name: str, signround: Signround, tmp_path: Path
) -> None:
    """With steps of 8 bits, and nothing learned; the norms are others, and so is every matrix before it is rounded."""
    saved_family(name, tmp_path / "model")
    out = nearest(signround, tmp_path / "model", "-m", "awq+signround", "-b", "8", "-g", "8")
    full, after = (logits(folder).log_softmax(-1) for folder in (tmp_path / "model", out))
    assert float((full.exp() * (full - after)).sum(-1).mean()) < 0.01
    given, stored = open_checkpoint(str(tmp_path / "model")), open_checkpoint(str(out))
    norms = [each for each in given.tensors if ("layernorm" in each or "ln_" in each) and each.endswith("weight")]
    assert sum(not torch.equal(given.read(each), stored.read(each)) for each in norms) >= 2


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3_text"])
def test_losses_fall_where_matrices_lie_turned_or_fused(name: str, signround: Signround, tmp_path: Path) -> None:
    saved_family(name, tmp_path / "model")
    before = losses(nearest(signround, tmp_path / "model", "-g", "8", "-b", "3"))
    after = losses(signround(tmp_path / "model", "-g", "8", "-b", "3", "--iters", "15"))
    assert len(after) == 2 and all(0 < learned < rounded for rounded, learned in zip(before, after, strict=True))
    assert any(learned < 0.9 * rounded for rounded, learned in zip(before, after, strict=True))
    assert bool(logits(tmp_path / "out").isfinite().all())


@pytest.mark.parametrize(
    "flags",
    [
        ["-f", "gptq"],
        ["-f", "gptq_v2", "--asymmetric"],
        ["-f", "awq", "--asymmetric"],
    ],
    ids=" ".join,
)
def test_every_format_holds_what_was_learned(flags: list[str], model: Path, signround: Signround) -> None:
    before = logits(model)
    out = signround(model, "-g", "32", *flags)
    full, after = before.log_softmax(-1), logits(out).log_softmax(-1)
    assert float((full.exp() * (full - after)).sum(-1).mean()) < 0.2
    assert len(losses(out)) == 3


def test_what_is_left_out_stays_as_it_is(model: Path, signround: Signround) -> None:
    stored = open_checkpoint(str(signround(model, "-g", "32", "--ignore", "k_proj", "--ignore", "layers.1.")))
    given = open_checkpoint(str(model))
    assert set(stored.tensors) == set(given.tensors)
    for name in given.tensors:
        left = "k_proj" in name or "layers.1." in name or "layers" not in name or "norm" in name
        assert torch.equal(stored.read(name), given.read(name)) == left, name


def test_gradients_are_those_of_the_block_by_finite_differences(tmp_path: Path) -> None:
    saved_family("mixtral", tmp_path / "model")
    network = calibrate.network(open_checkpoint(str(tmp_path / "model")), calibrate.Where(dtype="F64"))
    windows = [torch.randint(3, 300, (16,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    batches = calibrate.batches_of(windows, 1000, 2)
    assert [len(batch) for batch in batches] == [2, 2]
    hidden, targets = (HiddenStates(torch.device("cpu"), None) for _ in range(2))
    with torch.no_grad():
        calls = calibrate.first_inputs(network, batches, hidden)
        block = network.blocks[0]
        for number in range(2):
            drawn = torch.randn(hidden[number].shape, dtype=torch.float64)
            drawn[0, 3] *= 300  # as long as attention's sinks are
            targets[number] = drawn
        with network.filled(block):
            visitor: Any = None  # nothing is visited
            forward = Forward(network, block, [call[0] for call in calls], hidden, visitor, lambda done: None)
            gains = torch.randn(targets[0].shape[-1], generator=torch.Generator().manual_seed(2))
            lesson = Lesson(forward, targets, gains)
            slopes = lesson.gradients(block.linears, [1])
            assert all(parameter.grad is None for parameter in block.module.parameters())
            for linear, slope in zip(block.linears, slopes, strict=True):
                assert slope is not None and slope.shape == linear.shape
                view, row, column = lesson.view(linear), linear.shape[0] // 2, 1
                was, ends = float(view[row, column]), []
                for end in (1e-3, -1e-3):
                    view[row, column] = was + end
                    ends.append(relative_error(forward.run(1), targets[1], gains))
                view[row, column] = was
                assert float(slope[row, column]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.02, abs=2e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stats", "stats"], "signround looks at the model itself, so statistics do not do"),
        (["--iters", "0"], "iters"),
        (["--lr", "0"], "lr"),
        (["--lr", "2"], "lr"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    flags: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(model), "-m", "signround", "-g", "32", *flags, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
