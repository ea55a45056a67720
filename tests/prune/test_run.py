"""Matrices pruned from the command line: which weights go, exactly how many, and what opens the result."""

from collections.abc import Callable
from pathlib import Path

import pruning_definitions as definition
import pytest
import torch
from families import saved_family
from masked_models import blocks
from pruned_models import manifest, matrices, opened
from quantization_definitions import lists
from safetensors.torch import load_file
from tiny_models import llama, saved
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prune.pattern import Sparsity, parse_pattern
from prune.sparsegpt import sparsegpt
from wtool.calibration_data.for_model import windows_asked
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.recipe_parts import Calibration
from wtool.statistics import lifts

Prune = Callable[..., Path]
Full = Callable[[str], tuple[PreTrainedModel, Path]]
NAMES = ["llama", "qwen3_moe", "gpt2", "phi3"]
SPARSE = ["magnitude", "wanda", "ria", "sparsegpt"]


@torch.no_grad()
def grams(model: PreTrainedModel, text: Path, folder: Path, *, lifted: bool = False) -> dict[str, Tensor]:
    """The mean of x xᵀ of every linear module of the layers, float64, by its tensor; short tokens lifted or not."""
    windows = windows_asked(open_checkpoint(str(folder)), Calibration(data=(str(text),), samples=8, seqlen=48))
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        flat = args[0].flatten(0, 1)  # as a Conv1D multiplies them: of windows nothing is known there
        rows = flat.double() * (lifts(flat if isinstance(module, Conv1D) else args[0]) if lifted else 1)
        found[f"{names[module]}.weight"] = rows.T @ rows / len(rows)

    linears = [each for block in blocks(model) for each in block.modules() if isinstance(each, nn.Linear | Conv1D)]
    hooks = [linear.register_forward_pre_hook(hook) for linear in linears]
    model(input_ids=windows.ids)
    for each in hooks:
        each.remove()
    return found


def expected_mask(method: str, weight: Tensor, gram: Tensor, asked: Sparsity) -> list[list[bool]]:
    norm, columns = gram.diagonal().sqrt().tolist(), weight.shape[1]
    if method == "magnitude":
        scores = [[abs(value) for value in row] for row in lists(weight)]
    else:
        scores = (
            definition.wanda(lists(weight), norm) if method == "wanda" else definition.ria(lists(weight), norm, 0.5)
        )
    if asked.pattern:
        return definition.by_pattern(scores, *asked.pattern)
    drop = asked.dropped(len(scores), columns, by_row=method == "wanda")
    return definition.by_row(scores, drop // len(scores)) if method == "wanda" else definition.by_matrix(scores, drop)


@pytest.mark.parametrize(("method", "amount"), [("wanda", ("--sparsity", "0.5")), ("ria", ("--pattern", "2:4"))])
@pytest.mark.parametrize("name", NAMES)
def test_each_block_is_pruned_by_what_the_pruned_ones_before_it_feed_it(
    name: str, method: str, amount: tuple[str, str], full: Full, prune: Prune, text: Path
) -> None:
    model, folder = full(name)
    out = prune(folder, "-m", method, *amount, "--no-sequential")
    before, after = matrices(folder), matrices(out)
    asked = parse_pattern("2:4") if "2:4" in amount else Sparsity(share=0.5)
    half = opened(out)  # pruned, but for its second block
    blocks(half)[1].load_state_dict(blocks(model)[1].state_dict())
    compared = 0
    for tensor, gram in (grams(model, text, folder) | second(grams(half, text, folder))).items():
        if tensor in before:  # a router is none
            keep = expected_mask(method, before[tensor], gram, asked)
            assert (after[tensor] != 0).tolist() == keep, tensor
            assert torch.equal(after[tensor], before[tensor] * torch.tensor(keep))
            compared += 1
    assert compared >= 8


def second(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gram for name, gram in found.items() if ".1." in name}


@pytest.mark.parametrize("lift", ["--lift", "--no-lift"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sparsegpt_starts_from_what_the_model_feeds_the_first_block(
    name: str, lift: str, full: Full, prune: Prune, text: Path
) -> None:
    model, folder = full(name)
    asked = ["-m", "sparsegpt", "--sparsity", "0.6", "--no-sequential", lift]
    before, after = matrices(folder), matrices(prune(folder, *asked))
    for tensor, gram in grams(model, text, folder, lifted=lift == "--lift").items():
        if ".0." in tensor:
            found = sparsegpt(before[tensor].contiguous(), gram.float(), Sparsity(share=0.6))
            assert torch.equal(after[tensor] != 0, found.keep)
            torch.testing.assert_close(after[tensor], found.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amount", ["0", "0.37", "1:4", "3:5"])
@pytest.mark.parametrize("method", SPARSE)
def test_exactly_as_many_weights_go_as_were_asked_for(method: str, amount: str, prune: Prune, tmp_path: Path) -> None:
    folder = saved(llama(intermediate_size=50).to(torch.bfloat16), tmp_path / "model")
    flag = "--pattern" if ":" in amount else "--sparsity"
    out = prune(folder, "-m", method, flag, amount)
    asked = parse_pattern(amount) if ":" in amount else Sparsity(share=float(amount))
    before, after, told = matrices(folder), matrices(out), manifest(out)
    zeros = 0
    for name, weight in after.items():
        rows, columns = weight.shape
        zeros += (gone := int((weight == 0).sum()))
        assert gone == asked.dropped(rows, columns, by_row=method == "wanda") and weight.dtype == torch.bfloat16
        assert told["report"][name.removesuffix(".weight")]["sparsity"] == pytest.approx(
            gone / weight.numel(), abs=1e-6
        )
        if asked.pattern:
            kept, of = asked.pattern
            whole = columns // of * of
            assert ((weight[:, :whole].reshape(rows, -1, of) != 0).sum(-1) == kept).all()
            assert (weight[:, whole:] != 0).all()
            tail = f"the last {columns - whole} columns of {columns} stay dense"
            notes = told["report"][name.removesuffix(".weight")].get("notes", [])
            assert notes == ([tail] if columns > whole else [])
    assert told["summary"]["dropped"] == zeros and told["summary"]["layers"] == len(after) == len(before)
    stored, was = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert stored.keys() == was.keys()
    assert all(torch.equal(stored[name], was[name]) for name in stored if name not in after)
    assert opened(out).config.intermediate_size == 50


def test_saved_statistics_are_of_the_dense_model(full: Full, prune: Prune, text: Path, tmp_path: Path) -> None:
    model, folder = full("phi3")
    stats = tmp_path / "stats"
    calibration = ["--calib", str(text), "--samples", "8", "--seqlen", "48"]
    assert run(["calibrate", str(folder), *calibration, "-o", str(stats), "--quiet"]) == 0
    before, dense = matrices(folder), grams(model, text, folder)
    for method in ("wanda", "ria"):
        out = prune(folder, "-m", method, "--sparsity", "0.5", "--stats", str(stats), name=method)
        for tensor, weight in matrices(out).items():
            keep = expected_mask(method, before[tensor], dense[tensor], Sparsity(share=0.5))
            assert (weight != 0).tolist() == keep, tensor
    for flags in (["sparsegpt", "--pattern", "2:4"], ["svd-llm", "--rank-ratio", "0.5"]):
        out = prune(folder, "-m", *flags, "--stats", str(stats), name=flags[0])
        report = manifest(out)["report"]
        assert len(report) == 8 and all(0 < each["output_error"] < 1 for each in report.values())


@pytest.mark.parametrize("lifted", [True, False])
def test_sparsegpt_goes_by_lifted_tokens_and_tells_of_others(
    lifted: bool, full: Full, prune: Prune, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From text and from statistics the first layer is the same, as nothing was changed before it."""
    _, folder = full("llama")
    stats, asked = tmp_path / "stats", ["-m", "sparsegpt", "--sparsity", "0.5"]
    calibration = ["--calib", str(text), "--samples", "8", "--seqlen", "48"]
    lift, other = ("--lift", "--no-lift") if lifted else ("--no-lift", "--lift")
    gathered = ["--lift"] if lifted else []
    assert run(["calibrate", str(folder), *calibration, *gathered, "-o", str(stats), "--quiet"]) == 0
    walked = matrices(prune(folder, *asked, "--no-sequential", *([] if lifted else [lift]), name="walked"))
    capsys.readouterr()
    saved = matrices(prune(folder, *asked, "--stats", str(stats), lift, name="saved"))
    assert "lifted" not in capsys.readouterr().err
    first = [name for name in walked if ".0." in name]
    assert len(first) == 7 and all(torch.equal(walked[name], saved[name]) for name in first)
    otherwise = matrices(prune(folder, *asked, "--no-sequential", other, name="otherwise"))
    assert any(not torch.equal(walked[name], otherwise[name]) for name in first)
    told = f"{stats}: these statistics {'are of lifted tokens' if lifted else 'count all tokens alike'}"
    assert (
        run(["prune", str(folder), *asked, "--stats", str(stats), other, "--dry-run", "-o", str(tmp_path / "o")]) == 0
    )
    assert told in capsys.readouterr().out
    blind = ["-m", "magnitude", "--sparsity", "0.5", "--stats", str(stats), "--dry-run", "-o", str(tmp_path / "o")]
    assert run(["prune", str(folder), *blind]) == 0
    assert "these statistics" not in capsys.readouterr().out


@pytest.mark.parametrize("method", SPARSE)
def test_owl_shares_sum_to_the_share_that_was_asked_for(method: str, prune: Prune, tmp_path: Path) -> None:
    folder = saved(llama(num_hidden_layers=3, hidden_size=64, intermediate_size=96), tmp_path / "model")
    calibration = ["--calib", str(tmp_path / "text.txt"), "--samples", "8", "--seqlen", "48"]
    (tmp_path / "text.txt").write_text("some text to calibrate on " * 200)
    flags = [
        "-m",
        method,
        "--sparsity",
        "0.6",
        "--layer-ratios",
        "owl",
        *(calibration if method == "magnitude" else []),
    ]
    out = prune(folder, *flags)
    told = manifest(out)["recipe"]["found"]["sparsity"]
    assert sum(told.values()) / 3 == pytest.approx(0.6, abs=1e-8) and len(set(told.values())) > 1
    for name, weight in matrices(out).items():
        share = Sparsity(share=told[name.split(".")[2]])
        assert int((weight == 0).sum()) == share.dropped(*weight.shape, by_row=method == "wanda")


def test_shares_by_shape_need_no_text(full: Full, prune: Prune) -> None:
    _, folder = full("gpt2")
    out = prune(folder, "-m", "magnitude", "--sparsity", "0.6", "--layer-ratios", "by-shape")
    found = matrices(out)
    densities = {name: 1 - int((each == 0).sum()) / each.numel() for name, each in found.items()}
    factors = [densities[name] * each.numel() / sum(each.shape) for name, each in found.items()]
    assert max(factors) / min(factors) < 1.01  # what is kept is in proportion to out + in
    weights = sum(each.numel() for each in found.values())
    assert sum(int((each == 0).sum()) for each in found.values()) / weights == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("pack", [[], ["--pack"]])
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_told(
    method: str, pack: list[str], prune: Prune, tmp_path: Path
) -> None:
    saved_family("mixtral", tmp_path / "model", num_hidden_layers=1, num_local_experts=32, intermediate_size=17)
    out = prune(tmp_path / "model", "-m", method, "--sparsity", "0.5", *pack)
    before, after, report = matrices(tmp_path / "model"), matrices(out), manifest(out)["report"]
    unseen = {f"{name}.weight" for name, entry in report.items() if entry["tokens"] == 0 and "experts" in name}
    assert len(unseen) >= 3
    for name in unseen if method != "magnitude" else ():
        assert report[name.removesuffix(".weight")]["fallback"] == "no token came to it: by magnitude"
        sizes = [[abs(value) for value in row] for row in lists(before[name])]
        rows, columns = before[name].shape
        drop = Sparsity(share=0.5).dropped(rows, columns, by_row=method == "wanda")
        keep = definition.by_row(sizes, drop // rows) if method == "wanda" else definition.by_matrix(sizes, drop)
        assert (after[name] != 0).tolist() == keep


def test_every_linear_sees_the_pruned_ones_before_it_in_a_sequential_walk(full: Full, prune: Prune, text: Path) -> None:
    model, folder = full("llama")
    out = prune(folder, "-m", "wanda", "--sparsity", "0.5")
    before, after = matrices(folder), matrices(out)
    seen = grams(opened(out), text, folder)  # what the pruned model feeds its linears
    dense = grams(model, text, folder)
    for name, weight in after.items():
        keep = expected_mask("wanda", before[name], seen[name], Sparsity(share=0.5))
        assert (weight != 0).tolist() == keep, name
    for_dense = {name: expected_mask("wanda", before[name], dense[name], Sparsity(share=0.5)) for name in after}
    assert any(for_dense[name] != (weight != 0).tolist() for name, weight in after.items())
