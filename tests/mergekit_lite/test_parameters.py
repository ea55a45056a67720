import pytest

from mergekit_lite.methods.table import DENSITY, Parameter
from mergekit_lite.parameters import Depths, resolve, value_at
from mergekit_lite.places import Filtered
from wtool.errors import UsageError

LAYERS = Depths([f"model.layers.{i}.mlp.experts.7.w1" for i in range(5)] + ["vision.blocks.1.x", "vision.blocks.0.x"])


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.embed_tokens.weight", 0.0),
        ("model.layers.0.self_attn.q_proj.weight", 0.0),
        ("model.layers.1.mlp.experts.3.w1", 0.25),
        ("model.layers.4.input_layernorm.weight", 1.0),
        ("vision.blocks.1.x", 1.0),
        ("model.norm.weight", 1.0),
        ("transformer.ln_f.bias", 1.0),
        ("lm_head.weight", 1.0),
        ("embed_out.weight", 1.0),
        ("backbone.norm_f.weight", 1.0),
        ("model.decoder.layer_norm.bias", 1.0),
        ("vision_tower.post_layernorm.weight", 1.0),
        ("vision_tower.pre_layrnorm.weight", 0.0),
        ("bert.embeddings.LayerNorm.weight", 0.0),
        ("bert.pooler.dense.weight", 1.0),
        ("cls.predictions.bias", 1.0),
        ("model.decoder.layernorm_embedding.weight", 0.0),
        ("shared.weight", 0.0),
        ("multi_modal_projector.linear_1.weight", 0.0),
    ],
)
def test_where_a_tensor_stands(name, depth):
    assert LAYERS.of(name) == depth


def test_one_layer_stands_at_the_start():
    assert Depths(["h.0.w"]).of("h.0.w") == 0.0


@pytest.mark.parametrize(
    ("values", "depth", "expected"),
    [
        ([0.0, 1.0], 0.25, 0.25),
        ([1.0, 0.5, 2.0], 0.75, 1.25),
        ([3.0], 0.4, 3.0),
        ([0, 1], 1.0, 1.0),
        ([0, 5, 1], 0.5, 5.0),
    ],
)
def test_gradients_interpolate(values, depth, expected):
    assert value_at(values, "x", depth) == expected


def test_the_first_filter_that_fits():
    setting = [Filtered(filter="mlp", value=[0.0, 1.0]), Filtered(filter="self_attn", value=0.5), Filtered(value=0.1)]
    assert value_at(setting, "model.layers.1.mlp.up", 0.3) == pytest.approx(0.3)
    assert value_at(setting, "model.layers.1.self_attn.q", 0.3) == 0.5
    assert value_at(setting, "lm_head", 0.3) == 0.1


def test_the_most_specific_place_wins_and_a_filter_that_does_not_fit_falls_through():
    model, recipe = {"density": [Filtered(filter="mlp", value=0.2)]}, {"density": 0.9}
    assert resolve("density", DENSITY, [model, recipe], "x.mlp.y", 0.0, "m") == 0.2
    assert resolve("density", DENSITY, [model, recipe], "x.attn.y", 0.0, "m") == 0.9
    assert resolve("density", DENSITY, [{}, {}], "x", 0.0, "m") == 1.0


@pytest.mark.parametrize("value", [1.5, -0.1, "half", True, float("nan")])
def test_values_out_of_range_are_named(value):
    with pytest.raises(UsageError, match="model a: 'density' is "):
        resolve("density", DENSITY, [{"density": value}], "x", 0.0, "model a")


def test_a_required_parameter_no_filter_gives():
    with pytest.raises(UsageError, match="'t' has no value for tensor 'x'"):
        resolve("t", Parameter(), [{"t": [Filtered(filter="mlp", value=0.2)]}], "x", 0.0, "parameters")
