"""A checkpoint with some of its layers is the model with the others taken out of its ModuleList."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family, saved_family
from masked_models import blocks
from tiny_models import SIZES, llama, saved
from transformers import AutoModelForCausalLM, BertForMaskedLM, PreTrainedModel

from wtool.checkpoint.base import Checkpoint
from wtool.checkpoint.folder import open_local
from wtool.errors import Mismatch, MissingInput, UsageError
from wtool.layer_stack import keep_layers, with_layers
from wtool.loading import quiet

TOKENS = torch.arange(3, 300, 25)[None]
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 4},
    "gemma3_text": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3_moe": {"decoder_sparse_step": 2},
    "deepseek_v3": {"first_k_dense_replace": 2},
}


def written(view: Checkpoint, folder: Path) -> Path:
    """A view of a checkpoint, saved by other means than ours."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: view.read(name).clone() for name in view.tensors}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(view.config))
    return folder


def opened(folder: Path, loader: Any = AutoModelForCausalLM) -> PreTrainedModel:
    with quiet():
        model, info = loader.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def without(model: PreTrainedModel, layers: tuple[int, ...]) -> torch.Tensor:
    """The logits of the full model when it runs these layers only."""
    model.set_attn_implementation("eager")
    stack = blocks(model)
    picked = [stack[number] for number in layers]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in layers]
    del stack[:]
    stack.extend(picked)
    if model.config.model_type == "bert":
        return model(input_ids=TOKENS).logits
    model.config.num_hidden_layers = len(layers)  # which some forwards go by
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("layers", [(0, 1, 3), (0, 2, 2, 3)])
def test_every_family_computes_with_the_layers_that_stay(name: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 4, **OWN.get(name, {})}
    saved(family(name, **settings), tmp_path / "full", with_tokenizer=False)
    view = keep_layers(open_local(tmp_path / "full", "full"), layers)
    small = opened(written(view, tmp_path / "cut"), BertForMaskedLM if name == "bert" else AutoModelForCausalLM)
    with torch.no_grad():
        found = small(input_ids=TOKENS).logits
    assert torch.allclose(found, without(family(name, **settings), layers), rtol=1e-4, atol=1e-4)
    if name != "bert":
        sampled = [small.generate(TOKENS, max_new_tokens=3, do_sample=False, use_cache=c) for c in (True, False)]
        assert torch.equal(*sampled)


def test_names_origins_and_the_rest_of_the_checkpoint(tmp_path: Path) -> None:
    saved(llama(num_hidden_layers=3), tmp_path / "full")
    source = open_local(tmp_path / "full", "full")
    view = keep_layers(source, (2, 0))
    assert view.origins["model.layers.0.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert view.origins["model.layers.1.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert view.origins["lm_head.weight"] == "lm_head.weight"
    assert len(view.tensors) == 3 + 2 * 9
    assert (view.files, view.identity(), view.folders()) == (source.files, source.identity(), source.folders())
    assert source.config["num_hidden_layers"] == 3
    with pytest.raises(MissingInput, match=r"full: no tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        view.read("model.layers.2.mlp.up_proj.weight")


def test_layers_for_multi_token_prediction_come_after_the_new_last_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved_family("deepseek_v3", tmp_path, num_hidden_layers=3, num_nextn_predict_layers=1)
    path = tmp_path / "model.safetensors"
    extra = {f"model.layers.3.{part}": torch.rand(4) for part in ("enorm.weight", "mlp.gate.weight")}
    save_file(load_file(path) | extra, path, {"format": "pt"})
    view = keep_layers(open_local(tmp_path, "full"), (0, 2))
    assert view.config["num_nextn_predict_layers"] == 1
    assert {name: view.origins[name] for name in view.tensors if ".layers.2." in name} == {
        name.replace("layers.3", "layers.2"): name for name in extra
    }


def test_lists_by_layer_are_cut_and_lists_of_tokens_are_not() -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "eos_token_id": [7, 8, 9],
        "architectures": ["A", "B", "C"],
        "windows": [1, 2, 3],
        "mlp_only_layers": [0, 2],
        "hybrid_override_pattern": "M*-",
        "per_layer_config": {"0": {"a": 1}, "2": {"a": 2}},
        "num_nextn_predict_layers": 1,
        "compress_ratios": [4, 5, 6, 0],
    }
    cut = with_layers(config, (2, 1))
    assert cut["eos_token_id"] == [7, 8, 9] and cut["architectures"] == ["A", "B", "C"]
    assert cut["windows"] == [3, 2] and cut["mlp_only_layers"] == [0]
    assert cut["hybrid_override_pattern"] == "-*" and cut["per_layer_config"] == {"0": {"a": 2}}
    assert cut["compress_ratios"] == [6, 5, 0]  # the layer for multi-token prediction keeps its own
    assert config["windows"] == [1, 2, 3]
    assert with_layers(config, (0, 1, 2)) == config


def test_a_nested_language_model_and_what_is_repeated_outside() -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 3, "hidden_size": 8}
    config = {"model_type": "gemma3", "num_hidden_layers": 3, "text_config": text, "vision_config": {"depth": 3}}
    cut = with_layers(config, (0, 2))
    assert cut["text_config"]["num_hidden_layers"] == cut["num_hidden_layers"] == 2
    assert cut["text_config"]["layer_types"] == ["sliding_attention"] * 2
    assert cut["vision_config"] == {"depth": 3} and text["num_hidden_layers"] == 3


def test_later_windows_are_told_to_older_readers_too() -> None:
    raw = {"model_type": "qwen2", "num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 4}
    assert with_layers(raw, (1, 2, 5))["max_window_layers"] == 2


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((0, 2), "there is no layer 2: the model has layers 0 to 1"),
        ((-1,), "there is no layer -1"),
        ((), "no layer would be left of 2"),
    ],
)
def test_layers_that_are_not_there(layers: tuple[int, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        with_layers({"model_type": "llama", **SIZES}, layers)


def test_a_configuration_that_does_not_say_its_depth_or_says_another(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not say how many layers there are \(none of num_hidden_layers"):
        with_layers({"model_type": "llama"}, (0,))
    saved(llama(), tmp_path, with_tokenizer=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(Mismatch, match=r"full: config.json says 5 layers, the tensors 'model\.layers\.\*' are of 2"):
        keep_layers(open_local(tmp_path, "full"), (0, 1))
