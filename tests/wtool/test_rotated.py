"""A model in another basis computes the same, whatever of it is turned; and what cannot be turned is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family, saved_family
from safetensors.torch import load_file
from tiny_models import llama, saved
from torch import Tensor
from transformers import PreTrainedModel

from wtool.checkpoint import open_checkpoint
from wtool.errors import Mismatch, MissingInput, UsageError
from wtool.hadamard import random_turn
from wtool.loading import load_model
from wtool.rotated import TURNING, Rotated

IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(3))
BIASES: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}}  # qwen2 has them anyway
Made = Callable[[str], tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random model of a family, its norms and biases too, and its folder."""
    known: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Path]:
        if name not in known:
            model = family(name, **BIASES.get(name, {}))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            known[name] = model, saved(model, tmp_path_factory.mktemp(name) / name, with_tokenizer=False)
        return known[name]

    return get


def rotated(folder: Path, seed: int = 0) -> Rotated:
    source = open_checkpoint(str(folder))
    return Rotated(source, random_turn(source.config["hidden_size"], seed), random_turn(8, seed + 1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("name", TURNING)
def test_logits_are_the_model_s_with_the_stream_and_the_values_turned(name: str, made: Made) -> None:
    model, folder = made(name)
    view = rotated(folder)
    assert view.head_dim == 8
    assert off(logits(load_model(view, dtype="F32")), logits(model)) < 1e-4
    before = load_file(folder / "model.safetensors")
    for key, stored in before.items():
        if stored.ndim == 2 and "norm" not in key:  # none is the same by being left alone
            assert off(view.read(key), stored) > 0.3, key
        elif key.endswith(("layernorm.weight", "model.norm.weight")):
            assert torch.equal(view.read(key), torch.ones(32))
        elif key.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias")):
            assert torch.equal(view.read(key), stored)


def test_values_are_turned_head_by_head_by_definition(made: Made) -> None:
    folder = made("qwen2")[1]
    source = open_checkpoint(str(folder))
    view, turn = rotated(folder), random_turn(8, 1)(torch.eye(8).double())
    bias = source.read("model.layers.1.self_attn.v_proj.bias").double().tolist()
    expected = [sum(bias[8 * head + i] * float(turn[i, j]) for i in range(8)) for head in range(2) for j in range(8)]
    found = view.read("model.layers.1.self_attn.v_proj.bias")
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    whole = torch.block_diag(*[turn] * 4)  # four query heads read the two
    stream = random_turn(32, 0)(torch.eye(32).double())
    name = "model.layers.0.self_attn.o_proj.weight"
    expected_o = (stream.T @ source.read(name).double() @ whole).float()
    torch.testing.assert_close(view.read(name), expected_o, rtol=1e-5, atol=1e-5)


def test_a_tied_head_gets_a_tensor_of_its_own_and_the_embedding_is_let_go(tmp_path: Path) -> None:
    model: Any = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2)
    folder = saved(model, tmp_path / "tied", with_tokenizer=False)
    view = rotated(folder)
    assert view.config["tie_word_embeddings"] is False and "lm_head.weight" in view.tensors
    assert off(logits(load_model(view, dtype="F32")), logits(model)) < 1e-4
    name = "model.embed_tokens.weight"
    assert view.read(name) is view.read(name)
    held = view.read(name)
    view.forget(name)
    assert view.read(name) is not held and torch.equal(view.read(name), held)


def test_bfloat16_is_rounded_once_to_what_float64_gives(tmp_path: Path) -> None:
    model: Any = llama()
    folder = saved(model.to(torch.bfloat16), tmp_path / "half", with_tokenizer=False)
    view, stored = rotated(folder), load_file(folder / "model.safetensors")
    stream = random_turn(32, 0)(torch.eye(32).double())
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(view.read(up), (stored[up].double() @ stream).to(torch.bfloat16))
    output = "model.layers.1.self_attn.o_proj.weight"
    heads = torch.block_diag(*[random_turn(8, 1)(torch.eye(8).double())] * 4)
    expected = (stream.T @ stored[output].double() @ heads).to(torch.bfloat16)
    assert view.read(output).dtype == torch.bfloat16
    assert float((view.read(output) != expected).float().mean()) < 0.01  # ties of float32 between the two turns


def test_the_digest_tells_seeds_and_what_is_turned_apart(made: Made) -> None:
    folder = made("llama")[1]
    source = open_checkpoint(str(folder))
    assert rotated(folder).digest == rotated(folder).digest
    alone = Rotated(source, random_turn(32, 0)).digest
    assert len({rotated(folder).digest, rotated(folder, 1).digest, alone}) == 3
    assert Rotated(source, None).digest is None


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "olmo2", "opt"])
def test_other_families_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    saved_family(name, tmp_path / name)
    reason = {
        "gpt2": "its norms take out the mean over channels",
        "opt": "its norms are not known here",
    }.get(name, "it has norms over what its blocks put out")
    with pytest.raises(UsageError, match=f"a {name} cannot be rotated: {reason}") as caught:
        Rotated(open_checkpoint(str(tmp_path / name)), None)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_refused_from_headers(made: Made) -> None:
    source: Any = open_checkpoint(str(made("llama")[1]))
    whole, config = source.tensors, source.config
    source.config = config | {"hidden_size": 16}
    with pytest.raises(Mismatch, match=r"is \[320, 32\], by config.json it would be any x 16"):
        Rotated(source, None)
    source.config = config | {"head_dim": 5}
    with pytest.raises(Mismatch, match="not of heads of 5"):
        Rotated(source, None)
    source.config = config
    source.tensors = {**whole, "model.layers.0.mlp.extra.weight": whole["model.norm.weight"]}
    with pytest.raises(Mismatch, match="tensor 'model.layers.0.mlp.extra.weight' is not known of a llama"):
        Rotated(source, None)
    source.tensors = {name: info for name, info in whole.items() if name != "model.norm.weight"}
    with pytest.raises(MissingInput, match="no tensor 'model.norm.weight'"):
        Rotated(source, None)
