"""Tiny models of many families, with random weights, each saved as transformers saves it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import SIZES, saved
from transformers import PreTrainedModel

MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# model type -> class, and what its configuration has beside SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"head_dim": 8, "num_experts": 4, **MOE}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 2}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "olmo2": ("Olmo2ForCausalLM", {"pad_token_id": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            **MOE,
        },
    ),
    "opt": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 2, "init_std": 0.3}),
    "bert": ("BertForMaskedLM", {}),
}


def family(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of a family in float32."""
    class_name, own = FAMILIES[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    return model_class(model_class.config_class(**SIZES | own | settings)).eval()


def saved_family(name: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """A random model of a family, saved in a folder with a tokenizer."""
    model = family(name, **settings)
    saved(model, folder)
    return model
