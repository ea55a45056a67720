"""The families whose checkpoints can be cut in width: what every tensor is made of, as a table.

A row names a module by the end of its name (`*` for a number) and tells, axis by axis as it lies on disk, what is
counted there:

    hidden       channels of the residual stream        ffn         channels inside a feed-forward block
    heads, kv    query and key-value heads × head_dim   expert_ffn  the same inside one expert
    experts      experts of a router                    -           stays as it is
    a+b          one projection fused from several

A bias counts what its module's output counts. The vocabulary is left alone. Names, keys and defaults are those of
transformers' classes (release 5.23).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wtool.errors import UsageError


@dataclass(frozen=True)
class Family:
    """How the checkpoints and configurations of a family of models are laid out."""

    rows: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]  # size -> how config.json spells it
    defaults: Mapping[str, int | None] = field(default_factory=dict)  # size -> where config.json lacks it
    aside: frozenset[str] = frozenset()  # other models inside this one, which stay as they are
    transposed: bool = False  # weights lie as [in, out]
    has_head_dim: bool = True  # or it is always hidden / heads
    hidden_over_heads: bool = False  # the configuration class demands a whole number
    scaled_embedding: bool = False  # by the root of hidden
    norm_offset: int = 0  # a norm multiplies by its weight plus this


NAMES = {"embed_tokens": "- hidden", "lm_head": "- hidden", "score": "- hidden", "norm": "hidden", "inv_freq": "-"}
ATTENTION = {
    "self_attn.q_proj": "heads hidden",
    "self_attn.k_proj": "kv hidden",
    "self_attn.v_proj": "kv hidden",
    "self_attn.o_proj": "hidden heads",
    "input_layernorm": "hidden",
    "post_attention_layernorm": "hidden",
}
FFN = {"mlp.gate_proj": "ffn hidden", "mlp.up_proj": "ffn hidden", "mlp.down_proj": "hidden ffn"}
HEAD_NORMS = {"self_attn.q_norm": "-", "self_attn.k_norm": "-"}
WIDE_NORMS = {"self_attn.q_norm": "heads", "self_attn.k_norm": "kv"}
SANDWICH = {"pre_feedforward_layernorm": "hidden", "post_feedforward_layernorm": "hidden"}
LLAMA = NAMES | ATTENTION | FFN
QWEN3_EXPERTS = {
    "mlp.gate": "experts hidden",
    "mlp.experts.*.gate_proj": "expert_ffn hidden",
    "mlp.experts.*.up_proj": "expert_ffn hidden",
    "mlp.experts.*.down_proj": "hidden expert_ffn",
}
MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "experts hidden",
    "block_sparse_moe.experts.*.w1": "expert_ffn hidden",
    "block_sparse_moe.experts.*.w2": "hidden expert_ffn",
    "block_sparse_moe.experts.*.w3": "expert_ffn hidden",
}
PHI3 = {"self_attn.qkv_proj": "heads+kv+kv hidden", "mlp.gate_up_proj": "ffn+ffn hidden"}
VISION = {"mm_input_projection_weight": "- hidden", "mm_soft_emb_norm": "-"}
GPT2 = {
    **{"wte": "- hidden", "wpe": "- hidden", "lm_head": "- hidden", "score": "- hidden"},
    **{"ln_f": "hidden", "ln_1": "hidden", "ln_2": "hidden", "attn.bias": "-", "attn.masked_bias": "-"},
    **{"attn.c_attn": "hidden heads+heads+heads", "attn.c_proj": "heads hidden"},
    **{"mlp.c_fc": "hidden ffn", "mlp.c_proj": "ffn hidden"},
}
BERT = {
    **{f"{kind}_embeddings": "- hidden" for kind in ("word", "position", "token_type")},
    **{"position_ids": "-", "LayerNorm": "hidden", "attention.self.query": "heads hidden"},
    **{"attention.self.key": "heads hidden", "attention.self.value": "heads hidden"},
    **{"attention.output.dense": "hidden heads", "intermediate.dense": "ffn hidden", "output.dense": "hidden ffn"},
    **{"pooler.dense": "hidden hidden", "transform.dense": "hidden hidden", "cls.predictions": "-"},
    **{"decoder": "- hidden", "seq_relationship": "- hidden", "classifier": "- hidden", "qa_outputs": "- hidden"},
}

KEYS = {
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
}
GPT2_KEYS = {"hidden": ("n_embd",), "ffn": ("n_inner",), "heads": ("n_head",)}
BERT_KEYS = {size: KEYS[size] for size in ("hidden", "ffn", "heads")}
EXPERT_KEYS = {"experts": ("num_experts", "num_local_experts"), "top_k": ("num_experts_per_tok",)}
QWEN3_MOE_KEYS = KEYS | EXPERT_KEYS | {"expert_ffn": ("moe_intermediate_size",)}
MIXTRAL_KEYS = {size: key for size, key in KEYS.items() if size != "ffn"} | EXPERT_KEYS
GEMMA3 = Family(
    LLAMA | HEAD_NORMS | SANDWICH | VISION,
    KEYS,
    {"hidden": 2304, "ffn": 9216, "heads": 8, "kv_heads": 4, "head_dim": 256},
    aside=frozenset({"vision_tower"}),
    hidden_over_heads=True,
    scaled_embedding=True,
    norm_offset=1,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA, KEYS, hidden_over_heads=True),
    "mistral": Family(LLAMA, KEYS, {"kv_heads": 8}),
    "qwen2": Family(LLAMA, KEYS, {"kv_heads": 32}),
    "qwen3": Family(LLAMA | HEAD_NORMS, KEYS, {"kv_heads": 32, "head_dim": 128}),
    "qwen3_moe": Family(
        LLAMA | HEAD_NORMS | QWEN3_EXPERTS,
        QWEN3_MOE_KEYS,
        {"kv_heads": 4, "experts": 128, "expert_ffn": 768, "top_k": 8},
    ),
    "mixtral": Family(
        NAMES | ATTENTION | MIXTRAL_EXPERTS,
        MIXTRAL_KEYS | {"expert_ffn": ("intermediate_size",)},
        {"kv_heads": 8, "experts": 8, "top_k": 2},
    ),
    "olmo2": Family(LLAMA | WIDE_NORMS | SANDWICH, KEYS),
    "phi3": Family(LLAMA | PHI3, KEYS),
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,
    "gpt2": Family(GPT2, GPT2_KEYS, transposed=True, has_head_dim=False),
    "bert": Family(BERT, BERT_KEYS, has_head_dim=False),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family's row of the table. raises: UsageError if the family is not in it"""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(
            f"only whole layers can be taken out of a '{kind}'; widths, heads and experts of: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]
