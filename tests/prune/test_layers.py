"""How pruned matrices lie on disk: packed, as factors, and multiplied back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pruned_models import manifest, matrices, opened
from safetensors.torch import load_file
from transformers import PreTrainedModel

from wtool.checkpoint import open_checkpoint
from wtool.loading import load_model

Prune = Callable[..., Path]
Full = Callable[[str], tuple[PreTrainedModel, Path]]
NAMES = ["llama", "qwen3_moe", "gpt2", "phi3"]
SPARSE = ["magnitude", "wanda", "ria", "sparsegpt"]
IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("method", "name"), [*zip(SPARSE, NAMES, strict=True)])
def test_packed_weights_are_the_same_in_less_room(method: str, name: str, full: Full, prune: Prune) -> None:
    _, folder = full(name)
    flags = ["-m", method, "--sparsity", "0.7"]
    plain, packed = prune(folder, *flags, name="plain"), prune(folder, *flags, "--pack", name="packed")
    ours, theirs = matrices(packed), matrices(plain)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    sizes = [(path / "model.safetensors").stat().st_size for path in (packed, plain)]
    assert sizes[0] < sizes[1]
    with torch.no_grad():
        logits = [load_model(open_checkpoint(str(path)), dtype="F32")(input_ids=IDS).logits for path in (packed, plain)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("name", "method", "ranks"),
    [
        ("llama", "svd", "uniform"),
        ("llama", "svd", "energy"),
        ("phi3", "svd-llm", "uniform"),
        ("qwen3_moe", "svd-llm", "energy"),
        ("gpt2", "svd-llm", "energy"),
    ],
)
def test_thin_matrices_hold_the_share_and_open_multiplied(
    name: str, method: str, ranks: str, full: Full, prune: Prune
) -> None:
    _, folder = full(name)
    flags = ["-m", method, "--rank-ratio", "0.5", "--ranks", ranks]
    thin, whole = prune(folder, *flags, name="thin"), prune(folder, *flags, "--multiply", name="whole")
    before, factors, products = matrices(folder), matrices(thin), matrices(whole)
    told = manifest(thin)["summary"]
    stored = load_file(thin / "model.safetensors")
    held = sum(each.numel() for key, each in stored.items() if "low_rank" in key or key in before)
    assert held == told["held"] <= 0.5 * sum(each.numel() for each in before.values())
    assert factors.keys() == products.keys() == before.keys()
    for key in before:
        torch.testing.assert_close(factors[key].float(), products[key], rtol=1e-4, atol=1e-4)
        rank = manifest(thin)["report"][key.removesuffix(".weight")].get("rank")
        assert rank is None or int(torch.linalg.matrix_rank(products[key].double(), rtol=1e-5)) == rank
    with torch.no_grad():
        ours, theirs = load_model(open_checkpoint(str(thin)), dtype="F32"), opened(whole)
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)
