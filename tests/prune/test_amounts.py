"""How much each matrix loses, found again from what hooks on the dense model see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved_family
from masked_models import blocks
from tiny_models import llama, saved
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune.amounts import by_energy, by_outliers
from prune.lowrank import allocate
from prune.planner import Found, open_source
from prune.recipe import parse_recipe
from wtool.calibrate import Where
from wtool.calibration_data import Windows
from wtool.calibration_data.for_model import windows_asked
from wtool.checkpoint import Checkpoint
from wtool.cli import run
from wtool.recipe_parts import Calibration
from wtool.statistics import lifts

IDS = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(2))
WINDOWS = Windows(IDS, None, {})
HERE = Where(dtype="F32", batch_tokens=48)


def found(how: Callable[..., Found], folder: Path, windows: Windows | None = WINDOWS, **asked: Any) -> Found:
    recipe = parse_recipe({"model": str(folder), **asked}, "here")
    source, statistics = open_source(recipe)
    return how(recipe, source, statistics, windows, HERE, lambda what, steps: lambda done: None)


@torch.no_grad()
def fed(model: PreTrainedModel) -> dict[str, Tensor]:
    """What every linear of the layers is fed, float64 [tokens, in], by the name of its tensor."""
    names = {module: name for name, module in model.named_modules()}
    seen: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[f"{names[module]}.weight"] = args[0].flatten(0, 1).double()

    linears = [module for block in blocks(model) for module in block.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(hook) for linear in linears]
    model(input_ids=IDS)
    for each in hooks:
        each.remove()
    return seen


def outlying(folder: Path) -> PreTrainedModel:
    """A llama of four layers, the later ones with more weights that stand out."""
    model = llama(num_hidden_layers=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter[torch.rand(parameter.shape, generator=generator) < 0.02 * number] *= 9
    saved(model, folder, with_tokenizer=False)
    return model


@pytest.mark.parametrize(("share", "spread"), [(0.5, 0.08), (0.7, 0.2), (0.9, 0.5)])
def test_shares_of_owl_by_the_paper(share: float, spread: float, tmp_path: Path) -> None:
    model = outlying(tmp_path)
    asked = {"method": "wanda", "sparsity": share, "layer_ratios": "owl", "owl_spread": spread}
    told = found(by_outliers, tmp_path, **asked)
    weights, inputs = dict(model.named_parameters()), fed(model)
    outliers: list[float] = []
    for number in range(4):
        scores: list[float] = []
        for name, x in inputs.items():
            if name.startswith(f"model.layers.{number}."):
                norms = x.square().sum(0).sqrt()
                scores += (weights[name].detach().double().abs() * norms).flatten().tolist()
        mean = sum(scores) / len(scores)
        outliers.append(sum(score > 5 * mean for score in scores) / len(scores))
    assert outliers[0] < outliers[3] and told.about is not None
    assert list(told.about["outliers"].values()) == pytest.approx(outliers, abs=2 / 7680)
    assert told.shares is not None and told.shares.keys() == inputs.keys()
    by_block = [told.shares[f"model.layers.{number}.mlp.up_proj.weight"] for number in range(4)]
    assert all(value == by_block[int(name.split(".")[2])] for name, value in told.shares.items())
    assert sum(by_block) / 4 == pytest.approx(share, abs=1e-6)  # blocks of one size
    if share + spread < 0.99:  # no block comes to a limit
        span = max(outliers) - min(outliers)
        wanted = [2 * spread * (outlier - min(outliers)) / span for outlier in outliers]
        assert by_block == pytest.approx([share - more + sum(wanted) / 4 for more in wanted], abs=1e-4)
    else:
        assert max(by_block) <= 0.99 and by_block[3] == min(by_block)


def dropped(shares: Any, source: Checkpoint) -> float:
    sizes = {name: source.tensors[name].elements for name in shares}
    return sum(shares[name] * sizes[name] for name in shares) / sum(sizes.values())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2"])
def test_shares_of_blocks_come_to_the_share_of_all_weights(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"decoder_sparse_step": 2, "num_hidden_layers": 3} if name == "qwen3_moe" else {}
    saved_family(name, tmp_path, **settings)  # layers of different sizes
    told = found(by_outliers, tmp_path, method="ria", sparsity=0.6, layer_ratios="owl", owl_times_mean=3)
    assert told.shares is not None and len(set(told.shares.values())) > 1
    source, _ = open_source(parse_recipe({"model": str(tmp_path), "layers": 1}, "here"))
    assert dropped(told.shares, source) == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("method", "lift"), [("svd", True), ("svd-llm", True), ("svd-llm", False)])
def test_ranks_by_the_energy_of_outputs_hold_no_more_than_asked(
    method: str, lift: bool, ratio: float, tmp_path: Path
) -> None:
    model = outlying(tmp_path)
    windows = None if method == "svd" else WINDOWS
    told = found(by_energy, tmp_path, windows, method=method, rank_ratio=ratio, lift=lift)
    weights, inputs = dict(model.named_parameters()), fed(model)
    energies, shapes = {}, {}
    for name, x in inputs.items():
        weight = weights[name].detach().double()
        x = x * lifts(x.view(*IDS.shape, -1)) if lift else x
        outputs = weight if method == "svd" else weight @ x.T / len(x) ** 0.5
        energies[name] = torch.linalg.svdvals(outputs)[: min(weight.shape)].square()
        shapes[name] = (weight.shape[0], weight.shape[1])
    assert told.ranks is not None and told.ranks.keys() == inputs.keys()
    held = sum(rank * sum(shapes[name]) if rank else weights[name].numel() for name, rank in told.ranks.items())
    whole = sum(weights[name].numel() for name in inputs)
    assert ratio - 0.02 < held / whole <= ratio
    expected = allocate(energies, shapes, ratio, relative=True)
    off = [abs((rank or 99) - (expected[name] or 99)) for name, rank in told.ranks.items()]
    assert max(off) <= 1  # what damping and float32 move
    assert len(set(told.ranks.values())) > 3


def test_saved_statistics_tell_the_same(text: Path, tmp_path: Path) -> None:
    folder, stats = saved(llama(num_hidden_layers=3), tmp_path / "model"), tmp_path / "stats"
    calibration = ["--calib", str(text), "--samples", "4", "--seqlen", "24"]
    assert run(["calibrate", str(folder), *calibration, "-o", str(stats), "--quiet"]) == 0
    source, _ = open_source(parse_recipe({"model": str(folder), "layers": 1}, "here"))
    windows = windows_asked(source, Calibration(data=(str(text),), samples=4, seqlen=24))
    for how, asked in (
        (by_outliers, {"method": "wanda", "sparsity": 0.5, "layer_ratios": "owl", "owl_times_mean": 3}),
        (by_energy, {"method": "svd-llm", "rank_ratio": 0.5, "lift": False}),
    ):
        walked = found(how, folder, windows, **asked)
        told = found(how, folder, None, **asked, statistics=str(stats))
        assert told.ranks == walked.ranks
        assert (told.shares is None) == (how is by_energy)
        assert told.shares == pytest.approx(walked.shares, abs=1e-4) if told.shares else not walked.shares
