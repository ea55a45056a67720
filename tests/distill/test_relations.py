"""Relations between tokens in attention: against the definition, and trained by as a user asks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distillation_definitions import relation_divergence
from distilled import manifest
from tiny_models import llama, saved
from transformers import GPT2Config, GPT2LMHeadModel

from distill.relations import layer_pair, projected, relation_heads, relations_apart
from wtool.cli import run

Distill = Callable[..., Path]


def test_they_are_those_of_the_definition() -> None:
    """Two models of other widths and numbers of heads; the last two tokens of the second window are not learnt."""
    small = llama(1, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    big = llama(2, num_hidden_layers=3)
    ids = torch.arange(14).reshape(2, 7) * 31 % 320
    learnt = torch.ones(2, 7, dtype=torch.bool)
    learnt[1, 5:] = False
    with torch.no_grad(), projected(small, 1) as ours, projected(big, 2) as theirs:
        states = small(input_ids=ids, output_hidden_states=True).hidden_states
        big(input_ids=ids)
    layer = small.model.layers[1]
    torch.testing.assert_close(ours["k_proj"], layer.self_attn.k_proj(layer.input_layernorm(states[1])).detach())
    expected = 0.0
    for name, heads in (("q_proj", 4), ("k_proj", 4), ("v_proj", 4)):
        for row in range(2):
            each = relation_divergence(ours[name][row].tolist(), theirs[name][row].tolist(), heads, True)
            expected += sum(value for value, here in zip(each, learnt[row].tolist(), strict=True) if here)
    assert float(relations_apart(ours, theirs, learnt, 4)) == pytest.approx(expected / 3, rel=1e-4)
    assert float(relations_apart(ours, ours, learnt, 4)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ours, theirs, most, heads", [(24, 32, 4, 4), (24, 32, 99, 8), (12, 16, 3, 2), (5, 7, 4, 1)])
def test_heads_divide_both_widths(ours: int, theirs: int, most: int, heads: int) -> None:
    assert relation_heads(ours, theirs, most) == heads


@pytest.mark.parametrize(
    "ours, theirs, kept, pair", [(2, 4, None, (1, 3)), (2, 4, (0, 2), (1, 2)), (1, 1, None, (0, 0))]
)
def test_which_layers_are_compared(ours: int, theirs: int, kept: tuple[int, ...] | None, pair: tuple[int, int]) -> None:
    assert layer_pair(ours, theirs, kept) == pair


@pytest.mark.parametrize("more", [(), ("--stream-teacher",), ("--checkpointing",), ("--lora", "4")], ids=str)
def test_relations_come_nearer(distill: Distill, more: tuple[str, ...]) -> None:
    told = manifest(distill("--kd", "0", "--ce", "1e-6", "--relations", "1", "--steps", "12", "--lr", "1e-2", *more))
    apart = [entry["relations"] for entry in told["training"]]
    assert apart[-1] < 0.8 * apart[0]


def test_where_they_cannot_be_told_is_said(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    model = saved(GPT2LMHeadModel(config), tmp_path / "gpt2")
    command = ["distill", str(model), "--student-layers", "1", "--data", str(text), "--seqlen", "32", "--steps", "2"]
    assert run([*command, "--relations", "1", "-o", str(tmp_path / "out"), "--quiet"]) != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has no q_proj, k_proj, v_proj of its own; leave --relations out" in last
