"""A model as llama.cpp wants it: the tables of `gguf_families` read backwards. No files here, and no bytes.

A GGUF file does not tell everything that config.json does: llama.cpp knows of each family which activation it has,
which layers attend to a window, how attention is scaled. So a model that differs from its family there is refused.
"""

from collections.abc import Mapping
from math import pi
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.gguf_families import (
    FAMILIES,
    LAYER,
    LLAMA3_ROPE,
    NEEDED,
    OPTIONAL,
    OUTER,
    Family,
)
from wtool.errors import Mismatch, did_you_mean

if TYPE_CHECKING:
    import torch

ALSO = {"mistral": "llama"}  # model types that llama.cpp takes for another family
LEFT_OUT = ("rotary_emb.inv_freq",)  # what old checkpoints hold and every loader computes anew
WINDOWED = {"gemma2": 2, "gemma3": 6}  # of so many layers the last attends to everything, the others to a window
ACTIVATIONS = {"gemma2": ("gelu_pytorch_tanh",), "gemma3": ("gelu_pytorch_tanh",)}


def family_for(config: Mapping[str, Any], where: object) -> tuple[str, Family]:
    """What llama.cpp calls a model's family, and the family.

    raises: Mismatch for one that is not known here
    """
    found = str(config.get("model_type"))
    names = {family.model_type: name for name, family in FAMILIES.items()} | ALSO
    if found not in names:
        raise Mismatch(
            f"{where}: no GGUF is made of the model type '{found}' here "
            f"(known: {', '.join(names)}{did_you_mean(found, names)})"
        )
    return names[found], FAMILIES[names[found]]


def gguf_name(family: Family, name: str, where: object) -> str:
    """A tensor's name in the file.

    raises: Mismatch for a name the family does not have
    """
    stem, _, leaf = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    inner = {theirs: ours for ours, theirs in family.layer.items()}
    if leaf in ("weight", "bias"):
        if stem in outer:
            return f"{outer[stem]}.{leaf}"
        block, _, rest = stem.removeprefix("model.layers.").partition(".")
        if stem.startswith("model.layers.") and block.isdecimal() and rest in inner:
            return f"blk.{block}.{inner[rest]}.{leaf}"
    raise Mismatch(f"{where}: tensor '{name}' is not one of a {family.architecture} as GGUF knows it")


def as_stored(values: "torch.Tensor", name: str, family: Family, config: Mapping[str, Any]) -> "torch.Tensor":
    """The numbers that a file has for a tensor: undone by `GGUFFile.read`.

    name: Hugging Face's
    """
    if family.norm_offset and name.endswith("norm.weight"):
        return values.float() + family.norm_offset
    if family.interleaved and f".{LAYER['attn_q']}." in name:
        return _interleaved(values, config["num_attention_heads"])
    if family.interleaved and f".{LAYER['attn_k']}." in name:
        return _interleaved(values, _key_heads(config))
    return values


def _interleaved(values: "torch.Tensor", heads: int) -> "torch.Tensor":
    """[heads * dim, ...] from halves to pairs: rows (0, dim/2), (1, dim/2 + 1), … of each head side by side."""
    halves = values.view(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def hyperparameters(name: str, family: Family, config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The metadata that describes a model.

    name:   llama.cpp's of the family
    config: config.json with nothing left out
    raises: Mismatch where the model differs from its family in what the file cannot tell
    """
    _check(name, family, config, where)
    told = {key: config[setting] for key, setting in NEEDED.items()}
    told["attention.layer_norm_rms_epsilon"] = float(told["attention.layer_norm_rms_epsilon"])
    told |= {"attention.head_count_kv": _key_heads(config), "vocab_size": config["vocab_size"]}
    told |= {f"attention.{each}_length": head_dim(config) for each in ("key", "value")}
    told |= {"rope.dimension_count": head_dim(config)} | _rope_metadata(config, where)
    if name in WINDOWED:
        for key, setting in OPTIONAL.items():
            if setting in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping") and config[setting]:
                told[key] = config[setting] if setting == "sliding_window" else float(config[setting])
    return {f"{name}.{key}": value for key, value in told.items()}


def notes(name: str, config: Mapping[str, Any]) -> list[str]:
    """What the user should know of what llama.cpp will do otherwise."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if name in WINDOWED or not window or window >= config["max_position_embeddings"]:
        return []
    return [f"the model attends to a window of {window} tokens; llama.cpp attends to all tokens"]


def head_dim(config: Mapping[str, Any]) -> int:
    """The width of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_divisors(config: Mapping[str, Any], where: object) -> list[float] | None:
    """What Llama 3's scaling divides each rotary frequency by (`rope_freqs.weight`); None without that scaling."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high, length = (rope.get(key, default) for key, default in LLAMA3_ROPE.items())
    count, divisors = head_dim(config) // 2, []
    for i in range(count):
        wavelength = 2 * pi * rope["rope_theta"] ** (i / count)
        smooth = min(max((length / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return divisors


def _key_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _rope(config: Mapping[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """The rotary embedding of a kind of layers, wherever transformers of some age wrote it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(rope.get(layers, rope))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return {"rope_theta": config.get("rope_theta") or 10000.0} | rope


def _rope_metadata(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    rope = _rope(config)
    told: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        told["rope.freq_base_swa"] = float(_rope(config, "sliding_attention")["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return told
    if kind not in ("linear", "yarn"):
        raise Mismatch(f"{where}: no GGUF is made of rotary scaling '{kind}' here (known: linear, llama3, yarn)")
    told |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        told["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return told


def _check(name: str, family: Family, config: Mapping[str, Any], where: object) -> None:
    allowed = ACTIVATIONS.get(name, ("silu",))
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in allowed:
        raise Mismatch(f"{where}: its activation is '{activation}'; llama.cpp computes a {name} with '{allowed[0]}'")
    if family.blocks_of_27b is not None:
        large = config["num_hidden_layers"] == family.blocks_of_27b
        scale = config["hidden_size"] // config["num_attention_heads"] if large else head_dim(config)
        if config["query_pre_attn_scalar"] != scale:
            found = config["query_pre_attn_scalar"]
            raise Mismatch(f"{where}: query_pre_attn_scalar is {found}; llama.cpp computes this {name} with {scale}")
    if name in WINDOWED:
        kinds = ["full_attention" if (i + 1) % WINDOWED[name] == 0 else "sliding_attention" for i in range(10_000)]
        if config["layer_types"] != kinds[: config["num_hidden_layers"]]:
            every = WINDOWED[name]
            raise Mismatch(f"{where}: layer_types; llama.cpp takes it that every {every}th layer attends to everything")
