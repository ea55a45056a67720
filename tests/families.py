"""Tiny models of many families, with random weights, each saved as transformers saves it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import SIZES, VOCABULARY, saved
from transformers import PreTrainedModel

from wtool.loading import quiet

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


def _t5() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": VOCABULARY,
    }
    sizes["decoder_start_token_id"] = 0
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def _whisper() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_mel_bins": 8, "vocab_size": VOCABULARY},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
        **{"max_source_positions": 16, "max_target_positions": 16},
        **{f"{token}_token_id": 1 for token in ("pad", "bos", "eos", "decoder_start")},
    }
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))


def _mamba() -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"image_size": 16, "patch_size": 8},  # 4 patches
}


def _llava() -> PreTrainedModel:
    text, vision = transformers.LlamaConfig(**SIZES), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    text = transformers.Gemma3TextConfig(**SIZES | FAMILIES["gemma3_text"][1])
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN
    )
    return transformers.Gemma3ForConditionalGeneration(config)


IMAGE_TOKEN = 7
# models that are not, or not only, a stack of text: encoders with decoders, towers beside the text, states
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": _t5,
    "whisper": _whisper,
    "mamba": _mamba,
    "llava": _llava,
    "gemma3": _gemma3,
}


def any_family(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family of either table, in float32."""
    if name in FAMILIES:
        return family(name, seed)
    torch.manual_seed(seed)
    return OTHERS[name]().eval()


def any_saved(name: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """Such a model, saved without a tokenizer."""
    model = any_family(name, seed)
    with quiet():
        model.save_pretrained(folder)
    return model


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """What a model of a family can be called with."""
    text = torch.tensor([[3, 5, 9, 2, 11, 4]])
    if name in ("t5", "whisper"):
        sound = {"input_features": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))}
        return {"decoder_input_ids": text, **(sound if name == "whisper" else {"input_ids": text.flip(1)})}
    if name in ("llava", "gemma3"):
        image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        kinds = {"token_type_ids": torch.tensor([[0, *[1] * 4, *[0] * 6]])} if name == "gemma3" else {}
        return {"pixel_values": image, "input_ids": torch.tensor([[3, *[IMAGE_TOKEN] * 4, *text[0]]]), **kinds}
    return {"input_ids": text}
