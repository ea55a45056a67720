"""Slices: every tensor of the output against the layers that the recipe names, by loops."""

import json

import pytest
import torch
import yaml
from layered import LAYER, config, llama, weights, written

from wtool.cli import run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, {name: llama(folder / name, depth, seed) for seed, (name, depth) in enumerate(DEPTHS.items())}


DEPTHS = {"a": 4, "b": 4, "c": 4, "deep": 6}


def merge(models, tmp_path, text, code=0, name="out", **changes):
    """Run a recipe in which models are named by letters."""
    folder, _ = models
    content = yaml.safe_load(text) | changes
    for each in [content, *content.get("slices", ()), *(s for x in content.get("slices", ()) for s in x["sources"])]:
        for key in ("model", "base_model"):
            if key in each:
                each[key] = str(folder / each[key])
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert run(["merge", str(path), "-o", str(tmp_path / name)]) == code
    return weights(tmp_path / name) if code == 0 else {}


def layer(number, rest):
    return f"model.layers.{number}.{rest}"


FRANKEN = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
- sources: [{model: a, layer_range: [3, 4]}]
"""


def test_layers_are_stacked_in_order_and_renumbered(models, tmp_path):
    found, (_, tensors) = merge(models, tmp_path, FRANKEN), models
    stack = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("a", 3)]
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert found.keys() == {layer(n, rest) for n in range(7) for rest in LAYER} | outside
    for number, (model, own) in enumerate(stack):
        for rest in LAYER:
            assert torch.equal(found[layer(number, rest)], tensors[model][layer(own, rest)])
    assert config(tmp_path / "out")["num_hidden_layers"] == 7
    for name in outside:  # of the first slice's model, and the last's: here both a
        assert torch.equal(found[name], tensors["a"][name])


def test_passthrough_takes_embeddings_of_the_first_slice_and_norm_and_head_of_the_last(models, tmp_path, capsys):
    text = FRANKEN.rsplit("- sources", 1)[0]
    found, (_, tensors) = merge(models, tmp_path, text), models
    assert torch.equal(found["model.embed_tokens.weight"], tensors["a"]["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], tensors["b"]["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], tensors["b"]["lm_head.weight"])
    said = capsys.readouterr().err
    assert "what comes before the layers is of" in said and "passthrough does not take all 2 models" in said


GRADIENT = """
merge_method: linear
parameters: {weight: 0.5}
slices:
- sources:
  - {model: a, layer_range: [0, 3], parameters: {weight: [0, 1]}}
  - {model: b, layer_range: [1, 4], parameters: {weight: 1}}
- sources:
  - {model: a, layer_range: [3, 4], parameters: {weight: [0, 1]}}
  - {model: c, layer_range: [0, 1]}
  parameters: {normalize: false, weight: 0.25}
"""


def test_gradients_run_over_each_slice_and_the_nearest_place_wins(models, tmp_path):
    found, (_, tensors) = merge(models, tmp_path, GRADIENT), models
    a, b, c = tensors["a"], tensors["b"], tensors["c"]
    for number, share in enumerate((0.0, 0.5, 1.0)):
        for rest in LAYER:
            mean = (share * a[layer(number, rest)] + b[layer(number + 1, rest)]) / (share + 1)
            torch.testing.assert_close(found[layer(number, rest)], mean)
    for rest in LAYER:  # one layer: the gradient's last value; the source of c has none, so its slice's
        torch.testing.assert_close(found[layer(3, rest)], a[layer(3, rest)] + 0.25 * c[layer(0, rest)])


def test_what_stands_outside_is_of_the_models_of_all_slices(models, tmp_path):
    found, (_, tensors) = merge(models, tmp_path, GRADIENT), models
    a, b, c = tensors["a"], tensors["b"], tensors["c"]
    name = "model.embed_tokens.weight"  # first slice, first value: 0 of a, 1 of b, and c by its only source
    torch.testing.assert_close(found[name], (0 * a[name] + b[name] + 0.5 * c[name]) / 1.5)
    for name in ("model.norm.weight", "lm_head.weight"):  # last slice, last value: 1 of a, 1 of b, the slice's of c
        torch.testing.assert_close(found[name], a[name] + b[name] + 0.25 * c[name])


def test_one_model_merged_with_itself(models, tmp_path):
    text = """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4], parameters: {weight: 3}}]
"""
    found, (_, tensors) = merge(models, tmp_path, text), models
    a = tensors["a"]
    for number in range(2):
        for rest in LAYER:
            mean = (a[layer(number, rest)] + 3 * a[layer(number + 2, rest)]) / 4
            torch.testing.assert_close(found[layer(number, rest)], mean)
    assert torch.equal(found["lm_head.weight"], a["lm_head.weight"])
    assert config(tmp_path / "out")["num_hidden_layers"] == 2


BASES = """
merge_method: task_arithmetic
base_model: a
parameters: {weight: 0.5}
slices:
- sources: [{model: b, layer_range: [0, 2]}, {model: c, layer_range: [0, 2]}]
- sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
  base_model: c
"""


def test_a_base_that_is_not_among_the_sources_gives_the_same_layers(models, tmp_path):
    found, (_, tensors) = merge(models, tmp_path, BASES), models
    a, b, c = tensors["a"], tensors["b"], tensors["c"]
    for rest in LAYER:
        for name in (layer(0, rest), layer(1, rest)):
            torch.testing.assert_close(found[name], a[name] + 0.5 * (b[name] - a[name]) + 0.5 * (c[name] - a[name]))
        for name in (layer(2, rest), layer(3, rest)):
            torch.testing.assert_close(found[name], c[name] + 0.5 * (a[name] - c[name]) + 0.5 * (b[name] - c[name]))


def test_models_of_unlike_depth(models, tmp_path):
    text = """
merge_method: linear
base_model: a
slices:
- sources: [{model: a, layer_range: [0, 4]}, {model: deep, layer_range: [2, 6]}]
"""
    found, (_, tensors) = merge(models, tmp_path, text), models
    for rest in LAYER:
        mean = (tensors["a"][layer(3, rest)] + tensors["deep"][layer(5, rest)]) / 2
        torch.testing.assert_close(found[layer(3, rest)], mean)
    assert config(tmp_path / "out")["num_hidden_layers"] == 4


def test_lists_with_an_entry_a_layer_follow(tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    llama(tmp_path / "g", 3, 0, layer_types=kinds, sliding_window=4)
    folder = (tmp_path, {})
    text = """
merge_method: passthrough
slices:
- sources: [{model: g, layer_range: [0, 2]}]
- sources: [{model: g, layer_range: [0, 3]}]
"""
    merge(folder, tmp_path, text)
    assert config(tmp_path / "out")["layer_types"] == kinds[:2] + kinds


def test_layers_for_prediction_of_more_tokens_come_after_the_new_last(tmp_path):
    made = llama(tmp_path / "m", 3, 0)
    (tmp_path / "m/config.json").write_text(json.dumps({**config(tmp_path / "m"), "num_hidden_layers": 2}))
    text = """
merge_method: passthrough
slices:
- sources: [{model: m, layer_range: [0, 2]}]
- sources: [{model: m, layer_range: [1, 2]}]
"""
    found = merge((tmp_path, {}), tmp_path, text)
    for rest in LAYER:
        assert torch.equal(found[layer(2, rest)], made[layer(1, rest)])
        assert torch.equal(found[layer(3, rest)], made[layer(2, rest)])
    assert config(tmp_path / "out")["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (FRANKEN.replace("[1, 4]", "[1, 5]"), 2, "slice 1: layer_range [1, 5] of "),
        (BASES.replace("{model: b, layer_range: [0, 2]}", "{model: b, layer_range: [1, 3]}"), 2, "name the base"),
        (FRANKEN.replace("passthrough", "slerp") + "parameters: {t: 0.5}", 2, "slice 0: slerp takes 2 model(s); 1 are"),
        (FRANKEN.replace("passthrough", "ties"), 2, "slice 0: ties needs a base"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, text, code, message):
    merge(models, tmp_path, text, code)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_several_stacks_are_refused_with_a_hint(tmp_path, capsys):
    names = ["encoder.layers.0.attn.q.weight", "decoder.layers.0.attn.q.weight"]
    written(tmp_path / "m", names, 0, {"model_type": "x", "num_hidden_layers": 1})
    text = "{merge_method: passthrough, slices: [{sources: [{model: m, layer_range: [0, 1]}]}]}"
    merge((tmp_path, {}), tmp_path, text, 2)
    said = capsys.readouterr().err
    assert "2 stacks of layers (decoder.layers., encoder.layers.); say with modules" in said
