"""How strongly experts speak, by a slow loop over tokens with transformers' own weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved_family
from masked_models import blocks
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune.experts import Routing
from prune.importance import Importance, observe
from wtool.calibrate import Where
from wtool.calibration_data import Windows
from wtool.checkpoint import open_checkpoint

IDS = torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(1))
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_experts": 5, "num_experts_per_tok": 3}),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 24}),  # more than tokens come to
]


def observed(folder: Path) -> Importance:
    where = Where(dtype="F32", batch_tokens=22)
    return observe(open_checkpoint(str(folder)), Windows(IDS, None, {}), where, lambda steps: lambda done: None)


@torch.no_grad()
def fed(model: PreTrainedModel) -> dict[int, Tensor]:
    """What goes into the experts of each layer that has them, float64 [tokens, hidden]."""
    moes: dict[int, Any] = {}
    for number, block in enumerate(blocks(model)):
        if found := [module for module in block.modules() if hasattr(module, "experts")]:
            moes[number] = found[0]
    seen: dict[int, list[Tensor]] = {number: [] for number in moes}
    hooks = [
        moe.register_forward_pre_hook(lambda _, args, number=number: seen[number].append(args[0].flatten(0, 1)))
        for number, moe in moes.items()
    ]
    for window in IDS:
        model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    return {number: torch.cat(rows).double() for number, rows in seen.items()}


def weights(moe: Any) -> list[Tensor]:
    """The router's, and all experts' [experts, out, in], in float64."""
    parts = (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj)
    return [part.detach().double() for part in parts]


def by_definition(moe: Any, rows: Tensor, normalized: bool) -> tuple[list[float], list[int]]:
    """Strengths and visits: every token to its experts, one after the other."""
    router, up, down = weights(moe)
    said: list[list[float]] = [[] for _ in router]
    for x in rows:
        chances = (router @ x).exp() / (router @ x).exp().sum()
        chosen = sorted(range(len(router)), key=lambda number: -float(chances[number]))[: moe.gate.top_k]
        whole = sum(float(chances[number]) for number in chosen) if normalized else 1.0
        for number in chosen:
            gate, value = (up[number] @ x).chunk(2)
            output = down[number] @ (gate / (1 + (-gate).exp()) * value)
            said[number].append(float(chances[number]) / whole * float(output.norm()))
    return [sum(each) / len(each) if each else 0.0 for each in said], [len(each) for each in said]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_strengths_and_visits_by_definition(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = saved_family(name, tmp_path, **settings)
    found, rows = observed(tmp_path), fed(model)
    assert found.strengths.keys() == found.visits.keys() == rows.keys() and rows
    for number, given in rows.items():
        moe: Any = next(module for module in blocks(model)[number].modules() if hasattr(module, "experts"))
        normalized = name == "mixtral" or bool(getattr(model.config, "norm_topk_prob", False))
        strengths, visits = by_definition(moe, given, normalized)
        assert found.visits[number].tolist() == visits and sum(visits) == 33 * moe.gate.top_k
        torch.testing.assert_close(found.strengths[number], torch.tensor(strengths), rtol=1e-4, atol=1e-5)
        assert (min(visits) == 0) == (settings.get("num_local_experts") == 24)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_energies_of_an_expert_are_of_the_tokens_routed_to_it(name: str, tmp_path: Path) -> None:
    experts = {"num_experts": 24} if name == "qwen3_moe" else {"num_local_experts": 24}
    model = saved_family(name, tmp_path, **experts)
    found, rows = observed(tmp_path), fed(model)
    moe: Any = next(module for module in blocks(model)[1].modules() if hasattr(module, "experts"))
    router, up, down = weights(moe)
    names = ("mlp.experts", "gate_proj", "up_proj", "down_proj")
    folder, gate, value, out = names if name == "qwen3_moe" else ("block_sparse_moe.experts", "w1", "w3", "w2")
    chosen = (rows[1] @ router.T).topk(moe.gate.top_k).indices
    for number in range(24):
        given = rows[1][(chosen == number).any(1)]
        halves = (given @ up[number].T).chunk(2, dim=-1)
        inner = nn.functional.silu(halves[0]) * halves[1]
        for leaf, inputs, weight in (
            (gate, given, up[number].chunk(2)[0]),
            (value, given, up[number].chunk(2)[1]),
            (out, inner, down[number]),
        ):
            energy = found.energies[f"model.layers.1.{folder}.{number}.{leaf}.weight"]
            squares = (inputs**2).sum(0) / max(1, len(inputs))
            torch.testing.assert_close(energy.double(), squares * (weight**2).sum(0), rtol=1e-3, atol=1e-7)
            assert energy.any() == (len(given) > 0)
    assert chosen.unique().numel() < 24


def test_what_an_expert_says_is_weighted_token_by_token() -> None:
    routing = Routing()
    index = torch.tensor([[0, 2], [2, 1], [0, 1]])  # three tokens, two choices each
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    routing.met(torch.zeros(3, 5), index, weights)
    routing.said(0, torch.tensor([10.0, 100.0]))  # tokens 0 and 2 chose it first
    routing.said(2, torch.tensor([1.0, 1000.0]))  # token 1 first, then token 0 as its second choice
    routing.met(torch.zeros(1, 5), torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.5]]))
    routing.said(2, torch.tensor([8.0]))
    strengths, visits = routing.told(4)
    assert visits.tolist() == [2, 0, 3, 0]
    expected = [(0.7 * 10 + 0.9 * 100) / 2, 0, (0.6 * 1 + 0.3 * 1000 + 0.5 * 8) / 3, 0]
    torch.testing.assert_close(strengths, torch.tensor(expected))
