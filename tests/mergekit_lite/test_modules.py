"""Modules: each tower of a model as the recipe tells, by loops."""

import pytest
import torch
import yaml
from layered import config, weights, written

from wtool.cli import run

LAYER = ("mlp.fc1.weight", "self_attn.q_proj.weight")
TEXT = ["language_model.model.embed_tokens.weight", "language_model.model.norm.weight", "language_model.lm_head.weight"]
PROJECTOR = "multi_modal_projector.linear_1.weight"
CONFIG = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 6},
    "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 3},
}


def text(number, rest):
    return f"language_model.model.layers.{number}.{rest}"


def vision(number, rest):
    return f"vision_tower.encoder.layers.{number}.{rest}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = [text(number, rest) for number in range(2) for rest in LAYER]
    names += [vision(number, rest) for number in range(3) for rest in LAYER]
    names += [*TEXT, PROJECTOR, "vision_tower.post_layernorm.weight"]
    return folder, {name: written(folder / name, names, seed, CONFIG) for seed, name in enumerate("abc")}


def merge(models, tmp_path, recipe, code=0):
    for name in models[1]:
        recipe = recipe.replace(f"model: {name}", f"model: {models[0] / name}")
    (tmp_path / "recipe.yml").write_text(recipe)
    assert run(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out")]) == code
    return weights(tmp_path / "out") if code == 0 else {}


BOTH = """
merge_method: linear
base_model: a
parameters: {normalize: false}
modules:
  text_decoder:
    models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: [0, 1]}}]
  vision_tower:
    models: [{model: a}, {model: c}]
    parameters: {normalize: true, weight: 2}
"""


def test_each_tower_has_its_own_models_and_parameters(models, tmp_path, capsys):
    found, (_, tensors) = merge(models, tmp_path, BOTH), models
    a, b, c = (tensors[name] for name in "abc")
    assert found.keys() == a.keys()
    share = {name: 1.0 for name in a} | {TEXT[0]: 0.0} | {text(0, rest): 0.0 for rest in LAYER}
    for name in a:
        if name.startswith("language_model"):
            expected = 0.5 * a[name] + share[name] * b[name]
        elif name.startswith("vision_tower"):
            expected = (a[name] + c[name]) / 2
        else:
            expected = a[name]
        torch.testing.assert_close(found[name], expected)
    assert torch.equal(found[PROJECTOR], a[PROJECTOR])
    assert "multi_modal_projector: of " in capsys.readouterr().err
    told = config(tmp_path / "out")
    assert told["text_config"] == CONFIG["text_config"] and told["vision_config"] == CONFIG["vision_config"]


def test_default_is_what_has_no_other_name(models, tmp_path):
    recipe = BOTH.replace("vision_tower:", "default:")
    found, (_, tensors) = merge(models, tmp_path, recipe), models
    for name, tensor in found.items():
        if not name.startswith("language_model"):
            torch.testing.assert_close(tensor, (tensors["a"][name] + tensors["c"][name]) / 2)


SLICES = """
merge_method: passthrough
modules:
  vision_tower:
    slices:
    - sources: [{model: a, layer_range: [0, 3]}]
    - sources: [{model: b, layer_range: [1, 3]}]
  text_decoder:
    slices:
    - sources: [{model: b, layer_range: [1, 2]}]
"""


def test_slices_within_towers(models, tmp_path):
    found, (_, tensors) = merge(models, tmp_path, SLICES), models
    a, b = tensors["a"], tensors["b"]
    for rest in LAYER:
        for number, (model, own) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2)]):
            assert torch.equal(found[vision(number, rest)], model[vision(own, rest)])
        assert torch.equal(found[text(0, rest)], b[text(1, rest)])
        assert text(1, rest) not in found and vision(5, rest) not in found
    for name in TEXT:
        assert torch.equal(found[name], b[name])
    assert torch.equal(found["vision_tower.post_layernorm.weight"], b["vision_tower.post_layernorm.weight"])
    told = config(tmp_path / "out")
    assert told["text_config"]["num_hidden_layers"] == 1 and told["vision_config"]["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("text_decoder", "text_decodr"), "no module 'text_decodr'"),
        (("text_decoder", "vision_model"), "'vision_tower' and 'vision_model' are both the module 'vision_tower'"),
        (("[1, 3]", "[1, 4]"), "layer_range [1, 4] of "),
        (("vision_tower", "multi_modal_projector"), "'multi_modal_projector' has no layers"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, change, message):
    merge(models, tmp_path, SLICES.replace(*change), 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_only_tower_may_be_named(tmp_path):
    made = written(tmp_path / "m", ["h.0.attn.q.weight", "ln_f.weight"], 0, {"model_type": "gpt2", "n_layer": 1})
    recipe = {"merge_method": "passthrough", "modules": {"default": {"models": [{"model": str(tmp_path / "m")}]}}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert run(["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out").keys() == made.keys()
