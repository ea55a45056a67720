"""compressed-tensors, `pack-quantized`: integer codes of 2 to 8 bits packed along the inputs, scales per group or row.

The package of that name (written after its version 0.20.0) reads it for transformers;
vLLM has a reader of its own. Of a linear layer with R outputs, C inputs and G groups:

    weight_packed      int32 [R, words(C)]   codes from 0 up
    weight_scale       [R, G], of the model's type
    weight_shape       int64 [2]             R and C
    weight_zero_point  int32 [words(R), G]   zeros from 0 up, packed along the outputs; asymmetric grids only
    weight_g_idx       int32 [C]             the group of each input; only where groups are ordered by activation,
                                             which 0.20 reads no longer
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from wtool.dtypes import TensorInfo
from wtool.errors import QuantizedInput
from wtool.formats.bits import pack, signed, unpack, unsigned, words
from wtool.formats.scheme import EXPERTS, Format, Scheme, Shape, entry, pattern
from wtool.grid import Grid, Quantized

if TYPE_CHECKING:
    import torch

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
FOLLOWED = "0.20.0"  # the version of the package whose layout this is


class CompressedTensors(Format):
    """The format as this file's header has it."""

    packed, scales = "weight_packed", "weight_scale"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    integers = ("weight_shape", "weight_g_idx")

    def unfit(self, shape: Shape, scheme: Scheme) -> str | None:
        size, inputs = scheme.grid.group_size, shape[1]
        if scheme.ordered:
            return "compressed-tensors has no groups ordered by activation since 0.20: take static groups, or gptq"
        if size != -1 and inputs % size:
            fits = [n for n in (128, 64, 32) if n < size and inputs % n == 0]
            cure = f"groups of {fits[0]}" if fits else "whole rows (-1)"
            return f"groups of {size} do not divide its {inputs} inputs, as compressed-tensors asks: take {cure}"
        return None

    def scale_dtype(self, dtype: str) -> str:
        return dtype if dtype in ("F16", "BF16") else "F32"

    def layout(self, shape: Shape, scheme: Scheme, scale_dtype: str) -> dict[str, TensorInfo]:
        (outputs, inputs), bits = shape, scheme.grid.bits
        groups = scheme.grid.groups(inputs)
        tensors = {
            "weight_packed": TensorInfo("I32", (outputs, words(inputs, bits))),
            "weight_scale": TensorInfo(scale_dtype, (outputs, groups)),
            "weight_shape": TensorInfo("I64", (2,)),
        }
        if not scheme.grid.symmetric:
            tensors["weight_zero_point"] = TensorInfo("I32", (words(outputs, bits), groups))
        if scheme.ordered:
            tensors["weight_g_idx"] = TensorInfo("I32", (inputs,))
        return tensors

    def encode(self, quantized: Quantized, scheme: Scheme) -> "dict[str, torch.Tensor]":
        import torch

        bits = scheme.grid.bits
        tensors = {
            "weight_packed": pack(unsigned(quantized.codes, bits), bits),
            "weight_scale": quantized.scales.contiguous(),
            "weight_shape": torch.tensor(quantized.codes.shape),
        }
        if quantized.zeros is not None:
            tensors["weight_zero_point"] = pack(unsigned(quantized.zeros.T, bits), bits).T.contiguous()
        if scheme.ordered:
            tensors["weight_g_idx"] = quantized.group_index.to(torch.int32)
        return tensors

    def settings(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        members: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            members.setdefault(scheme, []).append(name)
        # transformers 5 decodes all experts by the first group
        ranked = sorted(members, key=lambda scheme: not any(map(EXPERTS.match, members[scheme])))
        # vLLM tries classes before the parts of a fused layer, so with several groups none is named
        groups = [(scheme, members[scheme] if len(members) > 1 else ["Linear"]) for scheme in ranked]
        # transformers 5 opens zeros only to decode them, and decodes linears (but experts) by one group alone
        decoded = {} if len(members) > 1 or groups[0][0].grid.symmetric else {"dequantize": True}
        return {
            "quant_method": METHOD,
            **decoded,
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": _group(scheme, names) for i, (scheme, names) in enumerate(groups)},
            "ignore": list(plain),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
            "version": FOLLOWED,
        }

    def schemes(self, settings: Mapping[str, Any]) -> Callable[[str], Scheme]:
        refuse_what_changes_the_network(settings)
        found: dict[str, Scheme] = {}
        for group in entry(settings, "config_groups", dict).values():
            if not isinstance(group, dict):
                raise QuantizedInput("a preset in place of a group")
            scheme = _scheme(group, settings.get("format"))
            found |= dict.fromkeys(map(str, entry(group, "targets", list)), scheme)
        patterns = {target: pattern(target[3:]) for target in sorted(found) if target.startswith("re:")}
        return lambda layer: _match(layer, found, patterns)

    def shape(
        self, infos: Mapping[str, TensorInfo], scheme: Scheme, read: "Callable[[str], torch.Tensor | None]"
    ) -> Shape:
        (outputs, width), (_, groups), grid = infos["weight_packed"].shape, infos["weight_scale"].shape, scheme.grid
        inputs = groups * grid.group_size
        if grid.group_size != -1 and words(inputs, grid.bits) == width:
            return outputs, inputs
        # the last word, or group, may be part empty
        told = read("weight_shape") if "weight_shape" in infos and infos["weight_shape"].shape == (2,) else None
        return outputs, width * 32 // grid.bits if told is None else int(told[1])

    def decode(self, tensors: "Mapping[str, torch.Tensor]", scheme: Scheme, shape: Shape) -> Quantized:
        (outputs, inputs), grid = shape, scheme.grid
        told, index, zeros = tensors["weight_shape"], tensors.get("weight_g_idx"), tensors.get("weight_zero_point")
        if told.tolist() != list(shape):
            raise ValueError(f"weight_shape says {told.tolist()}, the other tensors {list(shape)}")
        group_index = grid.group_index(inputs) if index is None else index.long()
        if not 0 <= int(group_index.min()) <= int(group_index.max()) < grid.groups(inputs):
            raise ValueError(f"weight_g_idx names groups outside of 0 to {grid.groups(inputs) - 1}")
        codes = signed(unpack(tensors["weight_packed"], grid.bits, inputs), grid.bits)
        if zeros is not None:
            zeros = signed(unpack(zeros.T, grid.bits, outputs), grid.bits).T.contiguous()
        return Quantized(codes, tensors["weight_scale"], zeros, group_index)


FORMAT = CompressedTensors()


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """An entry of config_groups."""
    grid = scheme.grid
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }
    if scheme.ordered:
        weights["actorder"] = "group"
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": PACKED,
    }


def refuse_what_changes_the_network(settings: Mapping[str, Any]) -> None:
    """Refuse weights that are not all of what the model computes with."""
    for key in ("transform_config", "kv_cache_scheme"):
        if settings.get(key):
            raise QuantizedInput(f"its {key} says more than how the weights are stored")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise QuantizedInput(f"sparse as {sparsity['format']}")


def _scheme(group: Mapping[str, Any], default_format: Any) -> Scheme:
    """Read an entry of config_groups."""
    kind = group.get("format") or default_format
    weights = entry(group, "weights", dict)
    if kind != PACKED or weights.get("type", "int") != "int":
        raise QuantizedInput(f"weights as {kind}")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group")
    if strategy not in ("group", "channel"):
        raise QuantizedInput(f"scales by {strategy}")
    bits = entry(weights, "num_bits", int)
    size = -1 if strategy == "channel" else entry(weights, "group_size", int)
    if not 2 <= bits <= 8 or size == 0 or size < -1:
        raise ValueError(f"{bits} bits in groups of {size} are none")
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    return Scheme(Grid(bits, size, entry(weights, "symmetric", bool, True)), ordered)


def _match(layer: str, found: Mapping[str, Scheme], patterns: Mapping[str, re.Pattern[str]]) -> Scheme:
    """The scheme of the first target that fits: the layer's name before patterns, patterns before classes."""
    named = [layer, *(target for target, expression in patterns.items() if expression.match(layer)), "Linear"]
    scheme = next((found[target] for target in named if target in found), None)
    if scheme is None and len(set(found.values())) == 1:  # by another class, or by the names of a newer transformers
        scheme = next(iter(found.values()))
    if scheme is None:
        raise ValueError(f"no config group has '{layer}' among its targets")
    return scheme
