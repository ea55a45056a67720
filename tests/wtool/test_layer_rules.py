"""What a configuration says of a layer by its number is the same after other layers are taken out.

The judge is transformers: its configuration class reads the full and the cut configuration, both without lists.
"""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from wtool.errors import UsageError
from wtool.layer_rules import FULL_ATTENTION, explicit
from wtool.layer_stack import with_layers
from wtool.loading import quiet

DEPTH = 13
LAYERS = (0, 2, 3, 4, 9, 12)
LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
NUMBERS = ("moe_layers", "mlp_only_layers")


def read(config: dict[str, Any]) -> Any:
    """The configuration as transformers understands it."""
    with quiet():
        return CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        *((model_type, {"sliding_window": 8} if model_type == "exaone4" else {}) for model_type in FULL_ATTENTION),
        ("gemma3_text", {"sliding_window_pattern": 3}),
        ("cohere2", {"sliding_window_pattern": 2}),
        ("modernbert", {"global_attn_every_n_layers": 2}),
        ("qwen3_next", {"full_attention_interval": 3, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}),
        ("qwen2", {"use_sliding_window": False, "max_window_layers": 4}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3, "decoder_sparse_step": 3}),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 3}),
        ("smollm3", {}),
        ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 8}),
        ("llama4_text", {}),
        ("llama4_text", {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 3}),
        ("axk1", {"first_k_dense_replace": 2}),
        ("deepseek_v32", {"first_k_dense_replace": 4}),
    ],
)
def test_transformers_reads_the_same_of_the_layers_that_stay(model_type: str, settings: dict[str, Any]) -> None:
    raw = {"model_type": model_type, "num_hidden_layers": DEPTH, **settings}
    full, cut = read(raw), read(with_layers(raw, LAYERS))
    assert cut.num_hidden_layers == len(LAYERS)
    for key in LISTS:
        if (entries := getattr(full, key, None)) is not None:
            assert getattr(cut, key) == [entries[number] for number in LAYERS]
    for key in NUMBERS:
        if (numbers := getattr(full, key, None)) is not None and "decoder_sparse_step" not in raw:
            assert getattr(cut, key) == [new for new, old in enumerate(LAYERS) if old in numbers]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_between_layers_with_experts_becomes_a_list_of_those_without(step: int) -> None:
    raw = {"model_type": "qwen3_moe", "num_hidden_layers": 9, "decoder_sparse_step": step, "mlp_only_layers": [5]}

    def has_experts(config: dict[str, Any], layer: int) -> bool:  # as modeling_qwen3_moe decides
        return layer not in config["mlp_only_layers"] and (layer + 1) % config["decoder_sparse_step"] == 0

    cut = with_layers(raw, (1, 2, 5, 6, 8))
    assert [has_experts(cut, new) for new in range(5)] == [has_experts(raw, old) for old in (1, 2, 5, 6, 8)]


def test_dense_layers_come_first() -> None:
    raw = {"model_type": "deepseek_v3", "num_hidden_layers": 6}  # the class says 3 of them where the file is silent
    assert with_layers(raw, (1, 2, 4, 5))["first_k_dense_replace"] == 2
    assert with_layers(raw, (3, 4))["first_k_dense_replace"] == 0
    assert with_layers(raw, (0, 1))["first_k_dense_replace"] == 2
    with pytest.raises(UsageError, match="first_k_dense_replace is 3: .* but layer 4 would stand before one of them"):
        with_layers(raw, (0, 4, 1))


def test_rules_without_a_list_hold_by_their_period() -> None:
    raw = {
        "model_type": "jamba",
        "num_hidden_layers": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    full, cut = read(raw), read(with_layers(raw, (0, 1, 2, 3, 4)))
    assert cut.layers_block_type == full.layers_block_type[:5]
    assert with_layers(raw, (4, 5, 6, 7))["num_hidden_layers"] == 4
    with pytest.raises(UsageError, match="layer 1 cannot become layer 0: by attn_layer_period, layers move by 4 only"):
        with_layers(raw, (1, 2))


def test_what_goes_by_the_number_itself_can_only_lose_its_end() -> None:
    raw = {"model_type": "gpt2", "n_layer": 4, "scale_attn_by_inverse_layer_idx": True}
    assert with_layers(raw, (0, 1))["n_layer"] == 2
    with pytest.raises(UsageError, match="layer 2 cannot become layer 1: scale_attn_by_inverse_layer_idx"):
        with_layers(raw, (0, 2))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 2}, "no layer can be taken out of a 'gemma3n_text'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "with is_encoder_decoder"),
        ({"model_type": "minimax"}, "lacks 'layer_types', and the rule of a 'minimax'"),
        ({"model_type": "new", "sliding_window_pattern": 3}, "the rule of a 'new' for it is not known"),
    ],
)
def test_what_is_not_known_is_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        with_layers({"num_layers": 4, **raw}, (0, 1))


def test_writing_rules_out_changes_nothing_for_transformers() -> None:
    raw = {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window_pattern": 2}
    listed = explicit(raw)
    assert "sliding_window_pattern" not in listed
    assert read(listed).layer_types == read(raw).layer_types
