"""Which tensors are of which tower, told from names as families have them."""

import pytest

from mergekit_lite.towers import find_tower, stacks, towers
from wtool.errors import UsageError

LLAVA = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.norm.weight",
    "multi_modal_projector.linear_1.weight",
    "image_newline",
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "vision_tower.vision_model.post_layernorm.weight",
]
QWEN_VL = [  # the head stands beside both towers, the merger has numbered parts that are no layers
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
    "visual.blocks.0.attn.qkv.weight",
    "visual.merger.mlp.0.weight",
    "visual.merger.mlp.2.weight",
    "visual.patch_embed.proj.weight",
]
NESTED = [
    "lm_head.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "model.visual.deepstack_merger_list.0.linear_fc1.weight",
]
OMNI = [  # towers within one of two parts
    "talker.model.layers.0.self_attn.q_proj.weight",
    "thinker.audio_tower.layers.0.self_attn.q_proj.weight",
    "thinker.lm_head.weight",
    "thinker.model.layers.0.self_attn.q_proj.weight",
    "thinker.model.embed_tokens.weight",
    "thinker.visual.blocks.0.attn.qkv.weight",
]
T5 = [
    "decoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.final_layer_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "lm_head.weight",
    "shared.weight",
]
CASES = {
    "llava": (
        LLAVA,
        {"language_model": [0, 1, 2, 3], "multi_modal_projector": [4], "image_newline": [5], "vision_tower": [6, 7]},
    ),
    "qwen2_vl": (QWEN_VL, {"model": [0, 1, 2, 3], "visual": [4, 5, 6, 7]}),
    "nested": (NESTED, {"model.language_model": [0, 1, 2], "model.visual": [3, 4]}),
    "t5": (T5, {"decoder": [0, 1, 3, 4], "encoder": [2]}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_of_one_tower(case):
    names, expected = CASES[case]
    assert towers(names) == {tower: [names[i] for i in members] for tower, members in expected.items()}


def test_towers_within_towers():
    found = towers(OMNI)
    assert {"talker", "thinker.audio_tower", "thinker.model", "thinker.visual"} <= set(found)
    assert sorted(name for members in found.values() for name in members) == sorted(OMNI)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.0.mlp.experts.7.w1", "model.layers.1.self_attn.q"], {"model.layers.": 2}),
        (["model.layers.0.self_attn.q", "mtp.layers.0.self_attn.q"], {"model.layers.": 1}),
        (["backbone.layers.0.mixer.A_log"], {"backbone.layers.": 1}),
        (["blocks.0.w", "blocks.1.w", "heads.0.w"], {"blocks.": 2}),
        (["weight"], {}),
    ],
)
def test_stacks_of_layers(names, expected):
    assert stacks(names) == expected
    assert list(towers(names)) == ["default"]


@pytest.mark.parametrize(
    ("names", "asked", "tower"),
    [
        (LLAVA, "text_decoder", "language_model"),
        (LLAVA, "vision_tower", "vision_tower"),
        (LLAVA, "vision_encoder", "vision_tower"),
        (LLAVA, "mm_projector", "multi_modal_projector"),
        (LLAVA, "model.vision_tower.encoder.layers", "vision_tower"),
        (QWEN_VL, "text_decoder", "model"),
        (QWEN_VL, "vision_tower", "visual"),
        (NESTED, "visual", "model.visual"),
        (NESTED, "model.language_model", "model.language_model"),
        (T5, "decoder", "decoder"),
        (T5, "encoder", "encoder"),
    ],
)
def test_a_tower_by_the_names_it_may_have(names, asked, tower):
    assert find_tower(asked, towers(names)) == tower


def test_an_unknown_one_is_refused_with_those_that_there_are():
    with pytest.raises(UsageError) as caught:
        find_tower("vison_tower", towers(LLAVA))
    assert "did you mean 'vision_tower'" in str(caught.value)
    assert "(it has language_model, multi_modal_projector, image_newline, vision_tower)" in str(caught.value)
