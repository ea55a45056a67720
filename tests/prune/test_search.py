"""Sizes for a budget: the counts are exact, the budget is kept, and the choice is the best there is."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from pruned_models import manifest, opened
from safetensors.torch import load_file
from transformers import PreTrainedModel

from prune.candidate import Candidate
from prune.search import Costs, Sizes, best, depths, parameter_count, widths
from prune.structure import Kept
from wtool.ablation import losses
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.errors import UsageError
from wtool.network import Network

Full = Callable[[str], tuple[PreTrainedModel, Path]]
Prune = Callable[..., Path]


@pytest.mark.parametrize("size", [1, 2, 7, 48, 576, 1536, 14336])
def test_widths_to_try(size: int) -> None:
    found = widths(size)
    assert found[0] == size and found == sorted(set(found), reverse=True)
    assert all(1 <= each <= size for each in found)
    assert size < 1000 or all(each % 64 == 0 for each in found)


def test_experts_to_try_are_never_fewer_than_a_token_goes_to() -> None:
    assert min(widths(8, 6)) == 6


def test_depths_to_try() -> None:
    assert list(depths(4)) == [4, 3, 2] and list(depths(1)) == [1]


def test_the_best_is_that_of_all_that_fit() -> None:
    costs = Costs({4: 0.0, 3: 0.3, 2: 1.1}, {8: 0.0, 6: 0.2, 4: 0.9}, {2: 0.0, 1: 0.5})

    def count(sizes: Sizes) -> int:
        return 10 + sizes.layers * (5 + 3 * sizes.inner + 7 * sizes.kv_heads)

    for budget in range(count(Sizes(2, 4, 1)), count(Sizes(4, 8, 2)) + 1, 9):
        every = [Sizes(*each) for each in product(costs.layers, costs.inner, costs.kv_heads)]
        lowest = min(costs.of(sizes) for sizes in every if count(sizes) <= budget)
        found = best(costs, count, budget, costs.of)
        assert count(found) <= budget and costs.of(found) == lowest


def test_what_is_measured_decides_among_the_first() -> None:
    costs = Costs({2: 0.0, 1: 0.3}, {8: 0.0, 4: 0.2}, {1: 0.0})
    found = best(costs, lambda sizes: sizes.layers * sizes.inner, 8, lambda sizes: float(sizes.layers))
    assert found == Sizes(1, 8, 1)  # by the sum of its rises alone it would be Sizes(2, 4, 1)


def test_a_budget_below_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="10 parameters: the smallest of the sizes that are tried has 20"):
        best(Costs({1: 0.0}, {2: 0.0}, {1: 0.0}), lambda sizes: 20, 10, lambda sizes: 0.0)


@pytest.mark.parametrize("least", [1, 20, 48])
def test_parameters_are_counted_exactly(least: int) -> None:
    def count(sizes: Sizes) -> int:
        return 1000 + sizes.layers * (17 + 3 * 32 * sizes.inner + 5 * 8 * sizes.kv_heads)

    counted = parameter_count(count, Sizes(6, 48, 4), Sizes(1, least, 2))
    for layers, inner, heads in product((1, 3, 6), sorted({least, 48}), (1, 3, 4)):
        assert counted(Sizes(layers, inner, heads)) == count(Sizes(layers, inner, heads))


def test_a_candidate_is_what_the_cut_writes(full: Full, prune: Prune) -> None:
    _, folder = full("llama")
    out = prune(folder, "--layers", "0,", "--ffn", "40", "--no-compensate")
    told = manifest(out)["recipe"]["kept"]
    ffn = {int(layer): tuple(numbers) for layer, numbers in told["ffn"].items()}
    view = Candidate(open_checkpoint(str(folder)), Kept(tuple(told["layers"]), ffn=ffn))
    written = open_checkpoint(str(out))
    assert view.tensors == written.tensors
    assert all(torch.equal(view.read(name), written.read(name)) for name in written.tensors)
    windows = [torch.arange(3, 40)]
    ours, theirs = (losses(Network(each, dtype="F32"), windows, [()])[0] for each in (view, written))
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("name", "budget"), [("llama", 27000), ("qwen3_moe", 43000)])
def test_a_budget_is_kept(name: str, budget: int, full: Full, prune: Prune) -> None:
    _, folder = full(name)
    out = prune(folder, "--params", str(budget))
    model = opened(out)
    held = sum(info.elements for info in open_checkpoint(str(out)).tensors.values())
    assert held <= budget == manifest(out)["recipe"]["prune"]["params"]
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_budget_of_bytes_is_kept_by_the_weights_on_disk(full: Full, prune: Prune) -> None:
    _, folder = full("llama")
    whole = open_checkpoint(str(folder)).nbytes
    out = prune(folder, "--size", f"{round(0.8 * whole)}B")
    held = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert 0.4 * whole < held <= round(0.8 * whole) == manifest(out)["recipe"]["prune"]["size"]
    assert opened(out)(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--size", "2KB"), "2,000 bytes: the smallest of the sizes that are tried has"),
        (("--size", "1MB", "--params", "1M"), "'params' and 'size' are two budgets for the sizes to find: give one"),
        (("--size", "much"), "'much' is not a size"),
        (("--size", "1MB", "-m", "magnitude", "--sparsity", "0.5"), "'size' and method 'magnitude' are two prunings"),
    ],
)
def test_a_budget_of_bytes_that_cannot_be_meant(
    flags: tuple[str, ...],
    line: str,
    full: Full,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, folder = full("llama")
    calib = ["--calib", str(text), "--samples", "2", "--seqlen", "16", "-q"] if len(flags) == 2 else []
    assert run(["prune", str(folder), *flags, *calib, "-o", str(tmp_path / "out")]) == 2
    assert line in capsys.readouterr().err


def test_a_budget_that_cannot_be_kept(
    full: Full, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = full("llama")
    flags = ["--params", "1K", "--calib", str(text), "--samples", "2", "--seqlen", "16", "-q"]
    assert run(["prune", str(folder), *flags, "-o", str(tmp_path / "out")]) == 2
    assert "1,000 parameters: the smallest of the sizes that are tried has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
