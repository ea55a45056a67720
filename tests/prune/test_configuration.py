"""The configuration of what is left, and what transformers' classes cannot say."""

from typing import Any

import pytest
import transformers
from families import family
from transformers import CONFIG_MAPPING

from prune.configuration import with_shape
from prune.structure import Kept, shape_of
from wtool.errors import UsageError

BOTH = (0, 1)


def same(numbers: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return dict.fromkeys(BOTH, numbers)


def after(name: str, kept: Kept, **settings: Any) -> dict[str, Any]:
    config = family(name).config.to_dict() | settings
    return with_shape(config, shape_of(config), kept)


def read(config: dict[str, Any]) -> Any:
    return CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "olmo2", "phi3", "mixtral", "gemma3_text", "qwen3"])
def test_head_dim_is_written_when_it_is_no_quotient_any_more(name: str) -> None:
    cut = after(name, Kept(BOTH, hidden=tuple(range(16))))
    assert (cut["head_dim"], cut["hidden_size"], read(cut).head_dim) == (8, 16, 8)
    fewer = after(name, Kept(BOTH, heads=same((0, 2))))
    assert (fewer["head_dim"], fewer["num_attention_heads"], fewer["num_key_value_heads"]) == (8, 2, 2)


def test_only_what_changed_is_written() -> None:
    full = family("qwen2").config.to_dict()
    cut = after("qwen2", Kept(BOTH, ffn=same((0, 1))))
    assert {key for key in cut if cut.get(key) != full.get(key)} == {"intermediate_size"}
    assert after("qwen2", Kept(BOTH)) == full
    assert full["intermediate_size"] == 48


def test_gpt2_writes_its_inner_width_when_hidden_changes() -> None:
    whole = after("gpt2", Kept(BOTH, hidden=tuple(range(24)), heads=same((0, 1, 3))))
    assert (whole["n_embd"], whole["n_head"], whole["n_inner"]) == (24, 3, 128)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_experts_under_the_name_the_file_has(key: str) -> None:
    config = family("qwen3_moe").config.to_dict()
    for old in ("num_experts", "num_local_experts"):
        config.pop(old, None)
    config[key] = 4
    cut = with_shape(config, shape_of(config), Kept(BOTH, experts=same((1, 3))))
    assert cut[key] == 2 and {"num_experts", "num_local_experts"} & set(cut) == {key}
    assert read(cut).num_experts == 2


def test_more_experts_are_asked_for_each_token_than_are_left() -> None:
    with pytest.raises(UsageError, match=r"1 experts would be left, but each token goes to 2 \(num_experts_per_tok\)"):
        after("mixtral", Kept(BOTH, experts=same((2,))))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("kept", [Kept(BOTH, hidden=tuple(range(24))), Kept(BOTH, heads=same((0, 1, 2)))])
def test_families_without_head_dim(name: str, kept: Kept) -> None:
    heads = 4 if kept.hidden else 3
    words = (
        f"a {name} has no head_dim of its own, so hidden must be heads × 8: {heads} heads go with hidden {heads * 8}"
    )
    with pytest.raises(UsageError, match=words):
        after(name, kept)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_heads_that_must_divide_hidden(name: str) -> None:
    """What is refused is refused by transformers as well, and what is named as fitting is not."""
    with pytest.raises(UsageError, match=f"a {name} needs .*: 22 is none of 4, but of 2 and 11"):
        after(name, Kept(BOTH, hidden=tuple(range(22))))
    config = family(name).config.to_dict() | {"hidden_size": 22, "head_dim": 8}
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        read(config)
    assert read(config | {"num_attention_heads": 2, "num_key_value_heads": 2}).hidden_size == 22


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmo2", "phi3"])
def test_other_families_need_no_such_thing(name: str) -> None:
    assert read(after(name, Kept(BOTH, hidden=tuple(range(22))))).hidden_size == 22


def test_phi3_measures_its_rotary_factors_against_hidden_over_heads() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "rope_type": "longrope", "rope_theta": 1e4}
    rope = {"rope_parameters": factors | {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 64}}
    both = after("phi3", Kept(BOTH, hidden=tuple(range(16)), heads=same((0, 2))), **rope)
    assert read(both).hidden_size == 16
    with pytest.raises(
        UsageError, match="a phi3 with longrope needs hidden / heads to stay 8: 4 heads go with hidden 32"
    ):
        after("phi3", Kept(BOTH, hidden=tuple(range(16))), **rope)
    with pytest.raises(Exception, match="short_factor"):
        read(both | {"num_attention_heads": 4})


def test_the_language_model_inside_gemma3() -> None:
    text = transformers.Gemma3TextConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=48).to_dict()
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 32}}
    cut = with_shape(config, shape_of(config), Kept((1,), hidden=tuple(range(16))))
    assert cut["text_config"]["hidden_size"] == 16 and cut["text_config"]["num_hidden_layers"] == 1
    assert cut["text_config"]["query_pre_attn_scalar"] == text["query_pre_attn_scalar"]
    assert cut["vision_config"] == {"hidden_size": 32} and "hidden_size" not in cut
