"""What a GGUF file calls things: the families of models whose names, layouts and settings are known here, as a table.

llama.cpp's converter renames every tensor of a Hugging Face checkpoint, and changes the numbers of a few:
    llama   the rows of q and k of each head are interleaved (the halves that rotary embedding pairs lie side by
            side), because its rotary embedding pairs neighbours
    gemma   norms are stored as 1 + w, because its RMS norm multiplies by the stored value
The settings of config.json are metadata under other names. Sources: llama.cpp's convert_hf_to_gguf.py and
llama-model.cpp; the tests compare with what transformers reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isclose, pi
from typing import Any

from wtool.errors import MalformedFile, QuantizedInput, did_you_mean

# Outside of the blocks, and inside of one ("blk.7.attn_q.weight"), without .weight or .bias.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TWO_NORMS = {"ffn_norm": "post_attention_layernorm"}
FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

# Metadata "<architecture>.<key>" -> setting of config.json.
NEEDED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}

# Llama 3's stretching of the slow rotary frequencies. A GGUF holds only the divisors that come out of it
# (rope_freqs.weight); these are the numbers the converter makes them from, the factor aside.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """How the files of one `general.architecture` relate to Hugging Face's."""

    model_type: str
    architecture: str  # transformers' class
    layer: Mapping[str, str]
    interleaved: bool = False  # rows of q and k
    norm_offset: float = 0.0  # what stored norms have more than Hugging Face's
    blocks_of_27b: int | None = None  # gemma scales attention by hidden/heads at this size, by the head's width else


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", LAYER | TWO_NORMS, interleaved=True),  # and Mistral's models
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", LAYER | TWO_NORMS),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", LAYER | TWO_NORMS | HEAD_NORMS),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", LAYER | FOUR_NORMS, norm_offset=1.0, blocks_of_27b=46),
    "gemma3": Family(
        "gemma3_text", "Gemma3ForCausalLM", LAYER | FOUR_NORMS | HEAD_NORMS, norm_offset=1.0, blocks_of_27b=62
    ),
}


def family_of(metadata: Mapping[str, Any], where: object) -> Family:
    """The family of a file.

    raises: QuantizedInput for a family that is not known here, or a file that is not one whole model
    """
    architecture = str(metadata.get("general.architecture"))
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise QuantizedInput(
            f"{where}: one of the {parts} parts of a split GGUF: "
            "join them first: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    if architecture not in FAMILIES:
        raise QuantizedInput(
            f"{where}: GGUF architecture '{architecture}' is not known here "
            f"(known: {', '.join(FAMILIES)}{did_you_mean(architecture, FAMILIES)})"
        )
    return FAMILIES[architecture]


def hugging_face_name(family: Family, name: str, where: object) -> str:
    """The Hugging Face name of a tensor.

    raises: QuantizedInput for a name the family does not have
    """
    stem, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        if stem in OUTER:
            return f"{OUTER[stem]}.{leaf}"
        block, _, inner = stem.removeprefix("blk.").partition(".")
        if stem.startswith("blk.") and block.isdecimal() and inner in family.layer:
            return f"model.layers.{block}.{family.layer[inner]}.{leaf}"
    kind = f"tensor '{name}' is not one of a {family.architecture}"
    raise QuantizedInput(f"{where}: {kind} as known here (mixture of experts? adapter?)")


def config_of(
    family: Family, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object
) -> dict[str, Any]:
    """config.json of a file, all but the stretching of Llama 3's rotary embedding (see `llama3_rope`).

    shapes: of the tensors, by their names in the file
    """
    prefix = metadata["general.architecture"]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key, setting in NEEDED.items():
        config[setting] = _number(metadata, f"{prefix}.{key}", where)
    for key, setting in OPTIONAL.items():
        if f"{prefix}.{key}" in metadata:
            config[setting] = _number(metadata, f"{prefix}.{key}", where)
    heads = config["num_attention_heads"]
    key_heads = f"{prefix}.attention.head_count_kv"
    config["num_key_value_heads"] = _number(metadata, key_heads, where) if key_heads in metadata else heads
    config["head_dim"] = _head_dim(config, shapes, where)
    config["vocab_size"] = _shape(shapes, "token_embd.weight", where)[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    for key, setting in TOKENS.items():
        config[setting] = metadata.get(f"tokenizer.ggml.{key}")
    if family.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    if family.blocks_of_27b is not None:
        large = config["num_hidden_layers"] == family.blocks_of_27b
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if large else config["head_dim"]
    scaling = _rope_scaling(metadata, prefix, config["head_dim"], where)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def _number(metadata: Mapping[str, Any], key: str, where: object) -> Any:
    if key not in metadata:
        raise MalformedFile(f"{where}: its metadata lacks '{key}'")
    if not isinstance(metadata[key], int | float):
        raise QuantizedInput(f"{where}: '{key}' differs from layer to layer, which is not known here")
    return metadata[key]


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, where: object) -> tuple[int, ...]:
    if name not in shapes:
        raise MalformedFile(f"{where}: lacks the tensor '{name}'")
    return shapes[name]


def _head_dim(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> int:
    """The width of a head, from the tensors: not every converter writes it down."""
    rows, heads = _shape(shapes, "blk.0.attn_q.weight", where)[0], config["num_attention_heads"]
    key_rows, key_heads = _shape(shapes, "blk.0.attn_k.weight", where)[0], config["num_key_value_heads"]
    width = rows // heads if heads else 0
    if rows != width * heads or width % 2 or key_rows != width * key_heads:
        raise MalformedFile(f"{where}: {rows} and {key_rows} rows of q and k do not make {heads} and {key_heads} heads")
    return width


def _rope_scaling(metadata: Mapping[str, Any], prefix: str, head_dim: int, where: object) -> dict[str, Any] | None:
    if metadata.get(f"{prefix}.rope.dimension_count", head_dim) != head_dim:
        raise QuantizedInput(f"{where}: rotary embedding of a part of each head is not known here")
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = metadata.get(f"{prefix}.rope.scaling.factor")
    length = metadata.get(f"{prefix}.rope.scaling.original_context_length")
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and length:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    raise QuantizedInput(f"{where}: rotary scaling '{kind}' with factor {factor} is not known here")


def llama3_rope(divisors: list[float], theta: float, where: object) -> dict[str, Any]:
    """The rope settings of config.json that give the divisors of rotary frequencies a file holds.

    divisors: one a frequency; 1 for fast ones, the factor for slow ones
    raises: QuantizedInput if they are not Llama 3's
    """
    factor = max(divisors)
    low, high, length = LLAMA3_ROPE.values()
    for i, divisor in enumerate(divisors):
        wavelength = 2 * pi * theta ** (i / len(divisors))
        smooth = min(max((length / wavelength - low) / (high - low), 0.0), 1.0)
        if not 1 <= factor < inf or not isclose(divisor, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            raise QuantizedInput(f"{where}: '{ROPE_FREQS}' is not Llama 3's rotary scaling: not known here")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
