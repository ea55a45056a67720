"""Which type each tensor of a GGUF file gets: llama.cpp's mixtures, and what it takes where a row does not divide.

A mixture is a type for most matrices and more bits for those that quality hangs on. Source of both tables:
llama.cpp's llama-quant.cpp, llama_tensor_get_type_impl and tensor_type_fallback; files of one name should have one
meaning, wherever they were made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wtool.formats.gguf import TYPES

# --type -> what most matrices get, and llama.cpp's number of the whole
MIXTURES: dict[str, tuple[str, int]] = {
    "F32": ("F32", 0),
    "F16": ("F16", 1),
    "BF16": ("BF16", 32),
    "Q8_0": ("Q8_0", 7),
    "Q6_K": ("Q6_K", 18),
    "Q5_K_M": ("Q5_K", 17),
    "Q5_K_S": ("Q5_K", 16),
    "Q5_1": ("Q5_1", 9),
    "Q5_0": ("Q5_0", 8),
    "Q4_K_M": ("Q4_K", 15),
    "Q4_K_S": ("Q4_K", 14),
    "Q4_1": ("Q4_1", 3),
    "Q4_0": ("Q4_0", 2),
    "Q3_K_L": ("Q3_K", 13),
    "Q3_K_M": ("Q3_K", 12),
    "Q3_K_S": ("Q3_K", 11),
    "Q2_K": ("Q2_K", 10),
}
DEFAULT_TYPE = "Q4_K_M"
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Given:
    """A tensor's type, and the one it would have if its rows divided."""

    type: str
    wanted: str


def type_of(name: str, shape: tuple[int, ...], mixture: str, config: Mapping[str, Any], *, tied: bool) -> Given:
    """The type of a tensor.

    name:    in the file
    mixture: a row of MIXTURES
    config:  the model's settings
    tied:    whether the output head is the embedding again
    """
    base = MIXTURES[mixture][0]
    if len(shape) < 2 or not name.endswith(".weight"):
        return Given("F32", "F32")
    if base not in TYPES:
        return Given(base, base)
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        wanted = "Q6_K" if base != "Q8_0" and shape[-1] % TYPES[base].values == 0 else "Q8_0"
    else:
        wanted = _in_block(name, mixture, base, config)
    return Given(_that_divides(wanted, shape[-1]), wanted)


def _in_block(name: str, mixture: str, base: str, config: Mapping[str, Any]) -> str:
    """What a mixture has for a matrix of a block, by its place in the block and the block's in the model."""
    _, _, rest = name.partition("blk.")
    block, _, inner = rest.partition(".")
    matrix, layers = inner.removesuffix(".weight"), config["num_hidden_layers"]
    if matrix == "attn_v":
        return _value_type(int(block), layers, mixture, base, config)
    if matrix == "ffn_down":
        return _down_type(int(block), layers, mixture, base)
    if matrix == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture, base)
    return base


def _value_type(block: int, layers: int, mixture: str, base: str, config: Mapping[str, Any]) -> str:
    shared = config["num_attention_heads"] // (config.get("num_key_value_heads") or config["num_attention_heads"])
    wanted = base
    if mixture == "Q2_K":
        wanted = "Q4_K" if shared >= 4 else "Q3_K"
    elif mixture == "Q3_K_M":
        wanted = "Q5_K" if block < 2 else "Q4_K"
    elif mixture == "Q3_K_L" or (mixture == "Q4_K_S" and block < 4):
        wanted = "Q5_K"
    elif mixture in ("Q4_K_M", "Q5_K_M") and _counts_more(block, layers):
        wanted = "Q6_K"
    of_70b = layers == 80 and shared > 1 and config["model_type"] in ("llama", "qwen2")
    return "Q5_K" if of_70b and wanted in ("Q3_K", "Q4_K") else wanted


def _down_type(block: int, layers: int, mixture: str, base: str) -> str:
    if mixture == "Q2_K":
        return "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if block < layers // 16 else "Q4_K"
    if mixture == "Q3_K_L" or (mixture == "Q4_K_S" and block < layers // 8):
        return "Q5_K"
    return "Q6_K" if mixture in ("Q4_K_M", "Q5_K_M") and _counts_more(block, layers) else base


def _counts_more(block: int, layers: int) -> bool:
    """The first eighth of the blocks, the last, and every third between."""
    eighth = layers // 8
    return block < eighth or block >= 7 * layers // 8 or (block - eighth) % 3 == 2


def _that_divides(wanted: str, columns: int) -> str:
    if columns % TYPES[wanted].values == 0:
        return wanted
    smaller = FALLBACK.get(wanted, wanted)
    return smaller if columns % TYPES[smaller].values == 0 else "F16"
