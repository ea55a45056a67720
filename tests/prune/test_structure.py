"""The table of families against transformers' models: their tensors, their sizes, their defaults."""

from dataclasses import replace
from typing import Any

import pytest
import transformers
from families import FAMILIES as MODELS
from families import family

from prune.structure import FAMILIES, Kept, Shape, cut_shape, extents, kept_heads, place_of, shape_of, slices
from wtool.errors import Mismatch, UsageError

SHAPE = Shape(layers=3, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=6, dense=frozenset(range(3)))
MIXED = replace(SHAPE, experts=4, expert_ffn=5, top_k=2, dense=frozenset({0}))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in MODELS])
def test_the_table_knows_every_tensor_of_the_family_and_its_size(name: str, tmp_path: Any) -> None:
    from tiny_models import saved

    from wtool.checkpoint.folder import open_local

    # every size another one, so that none can be taken for another
    sizes = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 10, "num_key_value_heads": 5}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4} if name in ("bert",) else {}
    sizes |= {"n_embd": 40, "n_head": 4, "num_attention_heads": 4} if name == "gpt2" else {}
    sizes |= {"moe_intermediate_size": 24, "num_experts": 6} if name == "qwen3_moe" else {}
    sizes |= {"num_local_experts": 6} if name == "mixtral" else {}
    source = open_local(saved(family(name, **sizes), tmp_path, with_tokenizer=False), name)
    shape = shape_of(source.config)
    assert (shape.hidden, shape.layers) == (40, 2)
    for tensor, info in source.tensors.items():
        expected = extents(FAMILIES[name], tensor, shape)
        assert all(want in (None, has) for want, has in zip(expected, info.shape, strict=False)), tensor
        assert len(expected) in (0, len(info.shape)), tensor
        cut = slices(FAMILIES[name], tensor, shape, Kept(layers=(0, 1)))
        assert cut is not None and all(stay is None for stay in cut)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gemma3",)])
def test_sizes_that_the_file_lacks_are_those_of_the_class(name: str) -> None:
    config = transformers.CONFIG_MAPPING[name]()
    always = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "n_embd",
        "n_layer",
        "n_head",
    )
    raw = {key: value for key, value in config.to_dict().items() if key in always}
    shape = shape_of({"model_type": name, **raw})
    assert shape.kv_heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    assert shape.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    for size, key in (
        ("experts", "num_experts"),
        ("top_k", "num_experts_per_tok"),
        ("expert_ffn", "moe_intermediate_size"),
    ):
        if hasattr(config, key):
            assert getattr(shape, size) == getattr(config, key)


def test_what_older_files_of_gemma3_leave_out() -> None:
    config = transformers.Gemma3TextConfig()
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34}
    shape = shape_of({"model_type": "gemma3", "text_config": text})
    assert (shape.hidden, shape.ffn, shape.heads) == (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
    )


def test_layers_with_and_without_experts_are_told_apart() -> None:
    raw = {**family("qwen3_moe").config.to_dict(), "num_hidden_layers": 6}
    assert shape_of({**raw, "decoder_sparse_step": 2, "mlp_only_layers": [3]}).dense == {0, 2, 3, 4}
    assert shape_of({**raw, "model_type": "mixtral"}).dense == frozenset()
    assert shape_of(family("llama").config.to_dict()).dense == {0, 1}


def test_query_heads_and_key_value_heads_go_together() -> None:
    assert kept_heads(Kept((0,)), SHAPE, 0) == (None, None)
    assert kept_heads(Kept((0,), heads={0: (0, 3)}), SHAPE, 0) == ((0, 3), (0, 1))
    assert kept_heads(Kept((0,), heads={0: (2,)}), SHAPE, 0) == ((2,), (1,))
    assert kept_heads(Kept((0,), kv_heads={0: (1,)}), SHAPE, 0) == ((2, 3), (1,))


def test_a_fused_projection_is_cut_part_by_part() -> None:
    kept = Kept((1,), hidden=(0, 7), ffn={1: (0, 5)}, heads={1: (1, 2)})
    name = "model.layers.1.self_attn.qkv_proj.weight"
    kv = (8, 9, 10, 11, 12, 13, 14, 15)  # keys are rows 8 to 11, values 12 to 15; both heads stay
    assert slices(FAMILIES["phi3"], name, SHAPE, kept) == ((2, 3, 4, 5, *kv), (0, 7))
    name = "model.layers.1.mlp.gate_up_proj.weight"
    assert slices(FAMILIES["phi3"], name, SHAPE, kept) == ((0, 5, 6, 11), (0, 7))
    wide = replace(SHAPE, kv_heads=4)
    name = "transformer.h.1.attn.c_attn.bias"
    assert slices(FAMILIES["gpt2"], name, wide, kept) == ((2, 3, 4, 5, 10, 11, 12, 13, 18, 19, 20, 21),)
    assert slices(FAMILIES["gpt2"], "h.1.attn.c_proj.bias", wide, kept) == ((0, 7),)
    assert slices(FAMILIES["gpt2"], "h.1.attn.c_proj.weight", wide, kept) == ((2, 3, 4, 5), (0, 7))


def test_experts_go_with_their_rows_of_the_router() -> None:
    kept = Kept((0, 1), experts={1: (0, 3)}, expert_ffn={(1, 3): (4,)})
    table = FAMILIES["mixtral"]
    assert slices(table, "model.layers.1.block_sparse_moe.gate.weight", MIXED, kept) == ((0, 3), None)
    assert slices(table, "model.layers.1.block_sparse_moe.experts.2.w1.weight", MIXED, kept) is None
    assert slices(table, "model.layers.1.block_sparse_moe.experts.3.w2.weight", MIXED, kept) == (None, (4,))
    assert place_of("model.layers.1.block_sparse_moe.experts.2.w1.weight") == (1, 2)
    assert place_of("lm_head.weight") == (-1, None)


def test_the_sizes_that_are_left() -> None:
    kept = Kept((2, 0), hidden=(1, 2, 3), ffn={0: (0,), 2: (5,)}, heads={0: (0, 2), 2: (1, 3)})
    assert cut_shape(SHAPE, kept) == Shape(2, 3, 2, 2, 2, ffn=1, dense=frozenset({0, 1}))
    few = Kept((0, 1), experts={1: (2,)}, expert_ffn={(1, 2): (0, 1)})
    after = cut_shape(MIXED, few)
    assert (after.experts, after.expert_ffn, after.ffn, after.dense) == (1, 2, 6, {0})
    assert cut_shape(SHAPE, Kept((0, 1, 2))) == SHAPE


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (
            Kept((0, 1), ffn={0: (1,)}),
            "one number of ffn channels for all, but 1 would stay in layer 0 and 6 in layer 1",
        ),
        (Kept((0,), ffn={0: (2, 1)}), "layer 0: ffn channels to keep must be some of 0 to 5 in ascending order"),
        (Kept((0,), ffn={0: (1, 1)}), "must be some of 0 to 5"),
        (Kept((0,), ffn={0: ()}), "must be some of 0 to 5"),
        (Kept((0,), hidden=(7, 8)), "the model: hidden channels to keep must be some of 0 to 7"),
        (Kept((0,), heads={0: (-1, 0)}), "layer 0: heads to keep must be some of 0 to 3"),
        (Kept((0,), heads={0: (0, 1, 2)}), r"layer 0: each key-value head .* equally many .* as \{0: 2, 1: 1\}"),
        (Kept((0,), heads={0: (0, 2)}, kv_heads={0: (0,)}), r"\[0\] stay, .* as \{0: 1, 1: 1\}"),
        (Kept((0, 1), heads={0: (0,), 1: (0, 2)}), "one number of heads"),
        (Kept((0,), ffn={3: (0,)}), "layer 3 is not there: there are 0 to 2"),
        (Kept((0,), experts={0: (0,)}), "layer 0 has no experts"),
    ],
)
def test_what_no_configuration_can_say(kept: Kept, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cut_shape(SHAPE, kept)


def test_experts_must_be_equally_many_and_equally_wide() -> None:
    with pytest.raises(UsageError, match="one number of experts for all, but 1 would stay in layer 1 and 4 in layer 2"):
        cut_shape(MIXED, Kept((1, 2), experts={1: (0,)}))
    with pytest.raises(UsageError, match="layer 1, expert 0 and 5 in layer 1, expert 1"):
        cut_shape(MIXED, Kept((1,), expert_ffn={(1, 0): (0,)}))
    with pytest.raises(UsageError, match="layer 1 has no dense ffn channels"):
        cut_shape(MIXED, Kept((1,), ffn={1: (0,)}))


def test_a_tensor_or_a_family_that_is_not_in_the_table() -> None:
    with pytest.raises(Mismatch, match=r"tensor 'model\.layers\.0\.mixer\.weight' is not in the table"):
        slices(FAMILIES["llama"], "model.layers.0.mixer.weight", SHAPE, Kept((0,)))
    with pytest.raises(UsageError, match="only whole layers can be taken out of a 'opt'"):
        shape_of(family("opt").config.to_dict())
    with pytest.raises(UsageError, match="config.json lacks 'hidden_size'"):
        shape_of({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2})
