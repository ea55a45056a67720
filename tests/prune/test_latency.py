"""A token's work: what the model really multiplies it with, and cuts that keep to a share of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pruned_models import manifest, opened
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from prune.latency import weights_of_a_token
from wtool.checkpoint import open_checkpoint
from wtool.cli import run

Full = Callable[[str], tuple[PreTrainedModel, Path]]
Prune = Callable[..., Path]
TOKENS = 16


def products(model: PreTrainedModel) -> int:
    """Weights that a token is multiplied with, by the operations of a forward; attention is another operation."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(3, 3 + TOKENS)[None])
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(name, 0) for name in (torch.ops.aten.mm, torch.ops.aten.addmm)) // (2 * TOKENS)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3", "gemma3_text", "olmo2"])
def test_a_token_is_multiplied_with_what_is_counted(name: str, full: Full) -> None:
    model, folder = full(name)
    assert weights_of_a_token(open_checkpoint(str(folder))) == products(model)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_of_experts_those_count_that_a_token_goes_to(name: str, full: Full) -> None:
    model, folder = full(name)
    text, inside, outside = model.config, 0, 0
    for tensor, info in open_checkpoint(str(folder)).tensors.items():
        if ".experts." in tensor:
            inside += info.elements
        elif len(info.shape) == 2 and not tensor.endswith(("embed_tokens.weight", "gate.weight")):
            outside += info.elements
    experts = getattr(text, "num_experts", None) or text.num_local_experts
    expected = outside + inside * text.num_experts_per_tok // experts
    assert weights_of_a_token(open_checkpoint(str(folder))) == expected


@pytest.mark.parametrize("ratio", [0.6, 0.85])
def test_a_share_of_the_work_is_kept_to(ratio: float, full: Full, prune: Prune) -> None:
    model, folder = full("llama")
    out = prune(folder, "--latency-ratio", str(ratio))
    left = products(opened(out))
    assert 0.5 * ratio < left / products(model) <= ratio == manifest(out)["recipe"]["prune"]["latency_ratio"]


def test_the_plan_tells_a_tokens_work(full: Full, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = full("llama")
    capsys.readouterr()
    assert run(["prune", str(folder), "--layers", "1", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["token_weights_before"] > told["token_weights_after"] > 0.4 * told["token_weights_before"]
    assert run(["prune", str(folder), "--layers", "1", "--dry-run"]) == 0
    share = told["token_weights_after"] / told["token_weights_before"]
    assert f"a token has {share:.1%} of the work it had" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--latency-ratio", "0.1"], "weights of a token: the smallest of the sizes that are tried has"),
        (["--latency-ratio", "0"], "latency_ratio"),
        (["--latency-ratio", "1.5"], "latency_ratio"),
        (["--latency-ratio", "0.8", "--params", "1M"], "'params' and 'latency_ratio' are two budgets"),
    ],
)
def test_shares_that_cannot_be_meant(
    flags: list[str], line: str, full: Full, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = full("llama")
    calib = ["--calib", str(text), "--samples", "2", "--seqlen", "16", "-q"]
    assert run(["prune", str(folder), *flags, *calib, "-o", str(tmp_path / "out")]) == 2
    assert line in capsys.readouterr().err
