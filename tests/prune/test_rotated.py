"""A rotated model computes what it did before; and the directions that it does not use go without a loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune.importance import observe
from prune.recipe import parse_recipe
from prune.rotate import principal_directions
from prune.rotated import TURNING, Rotated
from prune.structural import plan_sizes
from wtool.calibrate import Where
from wtool.calibration_data import Windows
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.errors import Mismatch, MissingInput, UsageError
from wtool.loading import quiet
from wtool.writer import MANIFEST

IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(3))
WINDOWS = Windows(IDS, torch.ones_like(IDS, dtype=torch.bool), {})
WHERE = Where(dtype="F32", batch_tokens=40)
BIASES: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}}
Prune = Callable[..., Path]
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
            known[name] = model, saved(model, tmp_path_factory.mktemp(name) / name)
        return known[name]

    return get


def opened(folder: Path) -> PreTrainedModel:
    """The model as transformers opens it, once it is clear that every tensor found its place."""
    loader: Any = AutoModelForCausalLM
    with quiet():
        model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


def off(found: PreTrainedModel, right: PreTrainedModel) -> float:
    """How far logits are off, as a share of their length."""
    return float((logits(found) - logits(right)).norm() / logits(right).norm())


def generated(model: Any, cache: bool) -> list[list[int]]:
    with quiet():
        return model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=2).tolist()


@pytest.mark.parametrize("name", TURNING)
def test_a_rotated_model_computes_the_same(name: str, made: Made, prune: Prune) -> None:
    model, folder = made(name)
    rotated = opened(prune(folder, "--hidden", "32", "--rotate"))
    assert off(rotated, model) < 1e-4
    assert generated(rotated, cache=True) == generated(rotated, cache=False) == generated(model, cache=True)
    before, after = load_file(folder / "model.safetensors"), rotated.state_dict()
    for key in [key for key in before if "layernorm" in key or key == "model.norm.weight"]:
        assert torch.equal(after[key], torch.ones(32))
    embedding, turned = before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]
    assert float((embedding - turned).norm() / embedding.norm()) > 0.3  # it is not the same by being left alone
    torch.testing.assert_close(turned @ turned.T, embedding @ embedding.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TURNING)
def test_a_rotated_and_cut_model_opens_and_generates(name: str, made: Made, prune: Prune) -> None:
    rotated = opened(prune(made(name)[1], "--hidden", "24", "--rotate", "--kv-heads", "1", "--layers", "1"))
    assert rotated.config.hidden_size == 24 and rotated.config.num_hidden_layers == 1
    assert torch.isfinite(logits(rotated)).all()
    assert generated(rotated, cache=True) == generated(rotated, cache=False)


def thin(rank: int, **settings: Any) -> PreTrainedModel:
    """A llama whose residual stream lies in a subspace that is not along channels; its norms multiply by 1."""
    model = llama(**settings)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q[:, :rank]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.copy_(weight @ basis @ basis.T)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.copy_(basis @ basis.T @ weight)
    return model


@pytest.mark.parametrize("rank", [24, 8])
def test_directions_that_are_not_used_go_without_a_loss(rank: int, prune: Prune, tmp_path: Path) -> None:
    model = thin(rank)
    folder = saved(model, tmp_path / "thin")
    rotated = opened(prune(folder, "--hidden", str(rank), "--rotate", name="rotated"))
    plain = opened(prune(folder, "--hidden", str(rank), name="plain"))
    bare = opened(prune(folder, "--hidden", str(rank), "--rotate", "--no-rescale-norms", name="bare"))
    assert rotated.config.hidden_size == rank
    assert off(rotated, model) < 1e-4
    assert off(plain, model) > 0.1
    assert off(bare, model) > 0.05  # what norms see is longer by the root of 32 / rank, which they take out
    for key, weight in rotated.state_dict().items():
        if "norm" in key:
            torch.testing.assert_close(weight, torch.full((rank,), (32 / rank) ** 0.5), rtol=1e-4, atol=0)


def test_what_else_goes_and_is_fitted_is_the_same_in_other_directions(prune: Prune, tmp_path: Path) -> None:
    folder = saved(thin(24, num_hidden_layers=3), tmp_path / "thin")
    sizes = ["--layers", "2", "--kv-heads", "1", "--ffn", "24"]
    plain = prune(folder, *sizes, name="plain")
    rotated = prune(folder, *sizes, "--hidden", "24", "--rotate", name="rotated")
    assert off(opened(rotated), opened(plain)) < 1e-3
    kept, also = (json.loads((out / MANIFEST).read_bytes())["recipe"]["kept"] for out in (plain, rotated))
    assert also == kept | {"hidden": list(range(24))}


def test_sizes_are_searched_in_the_directions_that_stay(prune: Prune, tmp_path: Path) -> None:
    folder = saved(thin(24), tmp_path / "thin")
    out = prune(folder, "--params", "20000", "--hidden", "24", "--rotate")
    assert 15_000 < sum(weight.numel() for weight in load_file(out / "model.safetensors").values()) <= 20_000
    assert opened(out).config.hidden_size == 24


def test_the_residual_stream_s_second_moment_is_that_of_unit_tokens_between_blocks(made: Made) -> None:
    model, folder = made("llama")
    seen: list[Tensor] = []
    layers = list(model.model.layers)
    hooks = [layer.register_forward_pre_hook(lambda module, given: seen.append(given[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda module, given, came: seen.append(came)))
    logits(model)
    for hook in hooks:
        hook.remove()
    tokens = [token.double() for states in seen for token in states.reshape(-1, 32)]
    assert len(tokens) == 3 * 60
    expected = torch.zeros(32, 32, dtype=torch.float64)
    for token in tokens:
        expected += torch.outer(token, token) / (token @ token / 32) / len(tokens)
    source = open_checkpoint(str(folder))
    found = observe(source, WINDOWS, WHERE, lambda steps: lambda done: None, second_moment=True).second_moment
    assert found is not None and float(found.trace()) == pytest.approx(32, rel=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert observe(source, WINDOWS, WHERE, lambda steps: lambda done: None).second_moment is None


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_what_norms_see_in_other_directions_is_what_those_of_the_rotated_model_see(name: str, made: Made) -> None:
    source = open_checkpoint(str(made(name)[1]))
    directions = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    found = observe(source, WINDOWS, WHERE, lambda steps: lambda done: None, directions=directions).spread
    right = observe(Rotated(source, directions), WINDOWS, WHERE, lambda steps: lambda done: None).spread
    assert found.keys() == right.keys() and len(found) == (5 if name == "llama" else 9)
    for key, spread in found.items():
        torch.testing.assert_close(spread, right[key], rtol=1e-3, atol=1e-4)


def test_a_tied_head_gets_a_tensor_of_its_own(prune: Prune, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2)
    folder = saved(model, tmp_path / "tied")
    recipe = parse_recipe({"model": str(folder), "hidden": 24, "rotate": True}, "here")
    (warning,) = plan_sizes(recipe, open_checkpoint(str(folder))).warnings
    assert warning.endswith(
        f"the head is tied to the embedding, and in other directions it differs: a tensor of its own adds {320 * 24:,} "
        "parameters"
    )
    out = prune(folder, "--hidden", "32", "--rotate")
    rotated = opened(out)
    assert off(rotated, model) < 1e-4
    assert rotated.config.tie_word_embeddings is False
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    told = json.loads((out / MANIFEST).read_bytes())["summary"]
    assert told["params_after"] - told["params_before"] == 320 * 32


def test_a_tied_head_that_is_stored_as_well_is_untied_too(prune: Prune, tmp_path: Path) -> None:
    model: Any = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2)
    folder = saved(model, tmp_path / "tied")
    stored = load_file(folder / "model.safetensors")
    head = stored["model.embed_tokens.weight"].clone()
    save_file({**stored, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    rotated = opened(prune(folder, "--hidden", "32", "--rotate"))
    assert rotated.config.tie_word_embeddings is False
    assert off(rotated, model) < 1e-4


def test_a_model_that_is_not_tied_gets_nothing_and_no_warning(made: Made) -> None:
    folder = made("llama")[1]
    plan = plan_sizes(
        parse_recipe({"model": str(folder), "hidden": 24, "rotate": True}, ""), open_checkpoint(str(folder))
    )
    assert not plan.warnings and plan.outputs.keys() == load_file(folder / "model.safetensors").keys()


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    model: Any = llama()
    model.to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.uniform_(0.5, 2)
    folder = saved(model, tmp_path / "half", with_tokenizer=False)
    directions = principal_directions(torch.randn(32, 32).square().diag().diag() + torch.ones(32, 32))
    view, stored = Rotated(open_checkpoint(str(folder)), directions), load_file(folder / "model.safetensors")
    query, norm = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"
    expected = (stored[query].double() * stored[norm].double()) @ directions
    assert torch.equal(view.read(query), expected.to(torch.bfloat16))
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(view.read(down), (directions.T @ stored[down].double()).to(torch.bfloat16))
    assert view.read(query).dtype == torch.bfloat16


def test_the_manifest_tells_the_rotation_and_the_tensors_that_were_read(made: Made, prune: Prune) -> None:
    folder = made("llama")[1]
    rotated = json.loads((prune(folder, "--hidden", "24", "--rotate", name="a") / MANIFEST).read_bytes())
    again = json.loads((prune(folder, "--hidden", "24", "--rotate", name="b") / MANIFEST).read_bytes())
    plain = json.loads((prune(folder, "--hidden", "24", name="c") / MANIFEST).read_bytes())
    assert rotated == again and len(rotated["recipe"]["rotation"]) == 32
    assert rotated["recipe"]["kept"]["hidden"] == list(range(24))
    assert rotated["inputs"] == plain["inputs"]  # the stored tensors, and not the turned ones


def test_what_cannot_be_rotated_is_refused_in_a_line(
    full: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {
        "gpt2": "a gpt2 cannot be rotated: its norms take out the mean over channels",
        "bert": "a bert cannot be rotated: its norms take out the mean over channels",
        "gemma3_text": "a gemma3_text cannot be rotated: it has norms over what its blocks put out",
        "olmo2": "a olmo2 cannot be rotated: it has norms over what its blocks put out",
        "opt": "only whole layers can be taken out of a 'opt'",
    }
    for name, reason in reasons.items():
        with pytest.raises(UsageError) as caught:
            Rotated(open_checkpoint(str(full(name)[1])), None)
        assert reason in str(caught.value) and "\n" not in str(caught.value)
    out = tmp_path / "out"
    assert run(["prune", str(full("olmo2")[1]), "--hidden", "24", "--rotate", "--dry-run"]) == 2
    assert "those that can: llama, mistral," in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("asked", [{"ffn": 24}, {"layers": 1}, {"method": "wanda", "sparsity": 0.5}])
def test_a_rotation_without_hidden_channels_to_keep_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="'rotate' turns the residual stream .*: give 'hidden' too"):
        parse_recipe({"model": "m", "rotate": True, **asked}, "here")


def test_tensors_that_do_not_fit_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "model", with_tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    with pytest.raises(Mismatch, match=r"is \[320, 32\], by config.json it would be any x 16"):
        Rotated(open_checkpoint(str(folder)), None)
    (folder / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(str(folder))
    without = {name: info for name, info in source.tensors.items() if name != "model.norm.weight"}
    source.tensors = without
    with pytest.raises(MissingInput, match="no tensor 'model.norm.weight'"):
        Rotated(source, None)
    with pytest.raises(MissingInput, match="no tensor 'lm_heat.weight'; did you mean 'lm_head.weight'"):
        Rotated(open_checkpoint(str(folder)), None).read("lm_heat.weight")
