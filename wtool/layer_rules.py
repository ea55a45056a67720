"""Rules over layer numbers in config.json (every sixth layer, the first three), written out as lists or refused.

Which layer attends how, and which has experts, is told by lists with one entry a layer, by lists of layer numbers,
or by a rule. A rule holds for the numbers that the layers have, so when layers are taken out it must first be
written out as the list that says the same. Where a family reads no such list, the rule must be true of the new
numbers too, and the cut is refused if it is not. The rules are those of transformers' configuration classes (release
5.23), with their defaults for keys that config.json lacks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from wtool.errors import UsageError

Config = Mapping[str, Any]

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# One layer of every period attends to all that is before it, the others to a window of it or through a state.
PERIOD_KEYS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "global_attn_every_n_layers",
    "full_attention_interval",
)
# model type -> the period where config.json does not say it, and whether that layer is the period's last or its first
FULL_ATTENTION: dict[str, tuple[int, bool]] = {
    **dict.fromkeys(("gemma2", "gpt_oss", "vaultgemma"), (2, True)),
    **dict.fromkeys(("afmoe", "cohere2", "exaone4", "olmo3"), (4, True)),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), (4, True)),  # through a state
    "gemma3_text": (6, True),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), (3, False)),
    **dict.fromkeys(("cwm", "granite_swa", "granitemoe_swa"), (4, False)),
}
LINEAR = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Families with another rule for layer_types. (What transformers saves has the list.)
OTHER_RULES = frozenset(
    "bailing_hybrid beam deepseek_v4 diffusion_gemma_text dots3_note_text embedding_gemma2_text flint gemma4_text "
    "gemma4_unified_text glm5_next_text inkling_text inkling2_text kimi_linear kolibri1 lfm3 mimo_v2_flash minimax "
    "muse_glimmer_text neomme olmo_hybrid qwen4_exp_text step3p5 t5gemma2_text ultrabert zamba2".split()
)
# The first layers have no experts; how many, where config.json does not say it.
DENSE_FIRST: dict[str, dict[str, int]] = {
    "first_k_dense_replace": {"deepseek_v3": 3, "glm4_moe": 1},
    "num_dense_layers": {},
}
# Rules that no list can take the place of: layers move by whole periods only, …
PERIODS = ("attn_layer_period", "expert_layer_period", "moe_layer_freq", "moe_layer_interval", "block_types")
BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "num_hash_layers")  # … not at all (they may go from the end), …
WHOLE_ONLY = ("num_kv_shared_layers", "kv_source_layers", "is_encoder_decoder")  # … or none can go


def text_config(config: Config) -> Config:
    """The part of a configuration that is about the language model: all of it, or its `text_config`."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def depth_key(text: Config) -> str:
    """The key that tells how many layers there are. raises: UsageError"""
    for key in DEPTH_KEYS:
        if type(text.get(key)) is int:
            return key
    raise UsageError(f"config.json does not say how many layers there are (none of {', '.join(DEPTH_KEYS)})")


def explicit(text: Config) -> dict[str, Any]:
    """A language model's configuration with its rules written out as lists, and without the rules.

    raises: UsageError if the family has a rule that is not known here
    """
    depth = text[depth_key(text)]
    result = dict(text)
    if not text.get("layer_types"):
        result |= _layer_types(text, depth)
    if text.get("model_type") in ("smollm3", "llama4_text"):
        interval = result.pop("no_rope_layer_interval", 4)
        if not result.get("no_rope_layers"):
            result["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in range(depth)]
    if text.get("model_type") == "llama4_text" and text.get("moe_layers") is None:
        step = text.get("interleave_moe_layer_step", 1)
        result["moe_layers"] = list(range(step - 1, depth, step))
    if "decoder_sparse_step" in text:
        dense, step = text.get("mlp_only_layers") or [], text["decoder_sparse_step"]
        result["mlp_only_layers"] = [layer for layer in range(depth) if layer in dense or (layer + 1) % step]
        result["decoder_sparse_step"] = 1
    if result.get("layer_types"):
        result = {key: value for key, value in result.items() if key not in PERIOD_KEYS}
    return result


def _layer_types(text: Config, depth: int) -> dict[str, list[str]]:
    """How each layer attends; nothing where all attend alike."""
    kind = text.get("model_type", "")
    period, last = FULL_ATTENTION.get(kind, (None, True))
    period = next((text[key] for key in PERIOD_KEYS if text.get(key)), period)
    if kind in OTHER_RULES or (period is not None and kind not in FULL_ATTENTION):
        raise UsageError(f"config.json lacks 'layer_types', and the rule of a '{kind}' for it is not known here")
    if period is None:
        return _late_windows(text, depth)
    other = "linear_attention" if kind in LINEAR else "sliding_attention"
    full = period - 1 if last else 0
    return {"layer_types": ["full_attention" if n % period == full else other for n in range(depth)]}


def _late_windows(text: Config, depth: int) -> dict[str, list[str]]:
    """The windows of qwen2 and its kin, which only later layers have."""
    kind = text.get("model_type")
    full = text.get("max_window_layers", 28 if kind in ("qwen2", "qwen2_moe", "qwen3") else None)
    if full is None or not text.get("use_sliding_window") or kind == "qwen3_moe":  # which has its window in all layers
        return {}
    late = [layer >= full if kind != "qwen2_moe" else layer < full and layer % 2 == 0 for layer in range(depth)]
    return {"layer_types": ["sliding_attention" if is_late else "full_attention" for is_late in late]}


def dense_first(text: Config, layers: Sequence[int]) -> dict[str, int]:
    """How many of the layers that stay, from the first, have no experts.

    raises: UsageError if one that has none would stand behind one that has
    """
    result: dict[str, int] = {}
    for key, defaults in DENSE_FIRST.items():
        first = text.get(key, defaults.get(text.get("model_type", "")))
        if first is None:
            continue
        dense = [number < first for number in layers]
        if not text.get("mlp_layer_types") and dense != sorted(dense, reverse=True):
            raise UsageError(
                f"{key} is {first}: the layers without experts must come first, "
                f"but layer {layers[dense.index(False)]} would stand before one of them"
            )
        result[key] = sum(dense)
    return result


def check_rules(config: Config, layers: Sequence[int]) -> None:
    """Refuse what would no longer be true of the layers under their new numbers. raises: UsageError"""
    text = text_config(config)
    for key in WHOLE_ONLY:
        if text.get(key) or config.get(key):
            raise UsageError(f"no layer can be taken out of a '{text.get('model_type')}' with {key} in config.json")
    for new, old in enumerate(layers):
        for key in PERIODS:
            period = _period(text, key)
            if new % period != old % period:
                raise UsageError(f"layer {old} cannot become layer {new}: by {key}, layers move by {period} only")
        for key in BY_NUMBER:
            if text.get(key) and new != old:
                raise UsageError(f"layer {old} cannot become layer {new}: {key} goes by a layer's number")


def _period(text: Config, key: str) -> int:
    """After how many layers a rule starts again; a list as long as the model is deep is no rule."""
    value = text.get(key)
    if isinstance(value, list):
        return len(value) if 0 < len(value) < text[depth_key(text)] else 1
    return value if type(value) is int and value > 0 else 1
