"""Quantized checkpoints as plain float32 matrices, decoded without the library of any tool that is measured.

Formats: compressed-tensors pack-quantized and gptq v1, of 2 to 8 bits. In both, codes are a little-endian stream of
bits over 32-bit words: along the input features in compressed-tensors' rows and in gptq's columns; codes of 3 bits
straddle words.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes in [0, 2^bits), int64 [rows, count], from int32 words [rows, at least count * bits / 32]."""
    wide = torch.cat([words.long() & 0xFFFFFFFF, words.new_zeros(len(words), 1).long()], dim=1)
    first = torch.arange(count) * bits
    word, shift = first // 32, first % 32
    two_words = wide[:, word] | wide[:, word + 1] << 32
    return two_words >> shift & (1 << bits) - 1


def decode_compressed(parts: dict[str, Tensor], bits: int, width: int) -> Tensor:
    """A pack-quantized matrix, float32 [out, in]; scales may be negative."""
    rows, columns = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].float()
    codes = unpack(parts["weight_packed"], bits, columns)
    zeros = torch.full(scales.shape, 1 << bits - 1)
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"].T, bits, rows).T
    group = parts.get("weight_g_idx", torch.arange(columns) // width).long()
    return (codes - zeros[:, group]).float() * scales[:, group]


def decode_gptq(parts: dict[str, Tensor], bits: int, width: int) -> Tensor:
    """A gptq v1 matrix, float32 [out, in]: zeros are stored less one."""
    scales = parts["scales"].float()
    columns = parts["qweight"].shape[0] * 32 // bits
    codes = unpack(parts["qweight"].T, bits, columns).T
    zeros = unpack(parts["qzeros"], bits, scales.shape[1]) + 1
    group = parts.get("g_idx", torch.arange(columns) // width).long()
    return ((codes - zeros[group]).float() * scales[group]).T.contiguous()


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """The plain baseline [out, in]: symmetric, a group's largest weight half a step beyond the last code."""
    half = 1 << bits - 1
    groups = weight.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(2, keepdim=True) / (half - 0.5)).bfloat16().float().clamp_min(1e-30)
    return ((groups / scales).round().clamp(-half, half - 1) * scales).flatten(1)


def decoded(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every quantized matrix of a checkpoint with its module's name; all have the same bits and group size."""
    config = next(folder.rglob("config.json"))
    settings = json.loads(config.read_text())["quantization_config"]
    if settings["quant_method"] == "compressed-tensors":
        (scheme,) = settings["config_groups"].values()
        weights = scheme["weights"]
        decode, packed, bits, group = decode_compressed, "weight_packed", weights["num_bits"], weights["group_size"]
    else:
        decode, packed, bits, group = decode_gptq, "qweight", settings["bits"], settings["group_size"]
    modules: dict[str, dict[str, Tensor]] = {}
    for path in sorted(config.parent.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                module, _, part = name.rpartition(".")
                modules.setdefault(module, {})[part] = file.get_tensor(name)
    for module, parts in modules.items():
        if packed in parts:
            yield module, decode(parts, bits, group if group and group > 0 else 1 << 30)
