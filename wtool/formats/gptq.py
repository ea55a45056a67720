"""GPTQ: the format of AutoGPTQ, which GPTQModel, vLLM, ExLlama and others read too; codes of 2, 3, 4 or 8 bits.

Of a linear layer with R outputs, C inputs and G groups:

    qweight  int32 [words(C), R]   codes from 0 up, packed along the inputs
    qzeros   int32 [G, words(R)]   zeros from 0 up, less one in version 1, packed along the outputs
    scales   float16 [G, R]
    g_idx    int32 [C]             the group of each input

Version 1 ("gptq") cannot hold a zero of 0: one less runs over, and what then stands in its word depends on the tool
that wrote it. AutoGPTQ sets all bits after it; GPTQModel and AutoRound take one from every code of the word at once,
so that it borrows from its neighbour. So symmetric grids only are written in version 1, whose zeros are 2^(b-1); what
is read is what the latter two wrote, and AutoGPTQ's wherever it left something to read. Version 2 ("gptq_v2",
GPTQModel's) has zeros as they are.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wtool import __version__
from wtool.dtypes import TensorInfo
from wtool.errors import QuantizedInput
from wtool.formats.bits import pack, signed, unpack, unsigned, words
from wtool.formats.scheme import Format, Scheme, Shape, entry, pattern
from wtool.grid import Grid, Quantized

if TYPE_CHECKING:
    import torch

Rule = tuple[re.Pattern[str], Mapping[str, Any]]  # layers by name, and what is different for them

METHOD = "gptq"
BITS = (2, 3, 4, 8)
# vLLM looks up layers that it fuses by the name they have together, and takes those only that are stored alike.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
OVERRIDES = ("bits", "group_size", "sym", "desc_act")  # that `dynamic` can set for a layer


@dataclass(frozen=True)
class Gptq(Format):
    """The format as this file's header has it."""

    version: int  # 1 or 2

    packed, scales = "qweight", "scales"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    optional = integers = ("g_idx",)

    @property
    def name(self) -> str:
        return "gptq" if self.version == 1 else "gptq_v2"

    def unfit(self, shape: Shape, scheme: Scheme) -> str | None:
        grid = scheme.grid
        if grid.bits not in BITS:
            return f"{self.name} has codes of {_listed(BITS)} bits, not {grid.bits}: take one, or compressed-tensors"
        if self.version == 1 and not grid.symmetric:
            return "gptq is safe for symmetric grids only: take gptq_v2, or compressed-tensors"
        for side, count in zip(("outputs", "inputs"), shape, strict=True):
            if count * grid.bits % 32:
                return (
                    f"its {count} {side} at {grid.bits} bits fill no whole number of 32-bit words, "
                    f"as {self.name} asks: take compressed-tensors"
                )
        return None

    def scale_dtype(self, dtype: str) -> str:
        return "F16"

    def layout(self, shape: Shape, scheme: Scheme, scale_dtype: str) -> dict[str, TensorInfo]:
        (outputs, inputs), bits = shape, scheme.grid.bits
        groups = scheme.grid.groups(inputs)
        return {
            "qweight": TensorInfo("I32", (words(inputs, bits), outputs)),
            "qzeros": TensorInfo("I32", (groups, words(outputs, bits))),
            "scales": TensorInfo(scale_dtype, (groups, outputs)),
            "g_idx": TensorInfo("I32", (inputs,)),
        }

    def encode(self, quantized: Quantized, scheme: Scheme) -> "dict[str, torch.Tensor]":
        import torch

        bits, zeros = scheme.grid.bits, quantized.zeros
        if zeros is None:
            zeros = torch.zeros_like(quantized.scales, dtype=torch.int8)
        less = 1 if self.version == 1 else 0
        return {
            "qweight": pack(unsigned(quantized.codes, bits), bits).T.contiguous(),
            "qzeros": pack(unsigned(zeros.T, bits) - less, bits),
            "scales": quantized.scales.T.contiguous(),
            "g_idx": quantized.group_index.to(torch.int32),
        }

    def settings(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        [(usual, _)] = Counter(schemes.values()).most_common(1)
        dynamic: dict[str, Any] = {f"-:{_pattern(layer)}": {} for layer in plain}
        for layer, scheme in schemes.items():
            if scheme != usual:
                dynamic[f"+:{_pattern(layer)}"] = _entries(scheme)
        return {
            "quant_method": METHOD,
            "checkpoint_format": self.name,
            **_entries(usual),
            "lm_head": any(layer.endswith("lm_head") for layer in schemes),
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [f"wtool:{__version__}"]},
        }

    def files(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"quantize_config.json": dict(settings)}

    def schemes(self, settings: Mapping[str, Any]) -> Callable[[str], Scheme]:
        pack_dtype = settings.get("pack_dtype", "int32")
        if str(pack_dtype).removeprefix("torch.") != "int32":
            raise QuantizedInput(f"packed in words of {pack_dtype}")
        usual = {"sym": True, "desc_act": False, **{key: settings[key] for key in OVERRIDES if key in settings}}
        rules = _rules(settings)
        _scheme(usual)
        return lambda layer: _scheme(usual | _override(layer, rules))

    def shape(
        self, infos: Mapping[str, TensorInfo], scheme: Scheme, read: "Callable[[str], torch.Tensor | None]"
    ) -> Shape:
        rows, outputs = infos["qweight"].shape
        return outputs, rows * 32 // scheme.grid.bits

    def decode(self, tensors: "Mapping[str, torch.Tensor]", scheme: Scheme, shape: Shape) -> Quantized:
        (outputs, inputs), grid = shape, scheme.grid
        index = tensors.get("g_idx")
        group_index = grid.group_index(inputs) if index is None else index.long()
        if not 0 <= int(group_index.min()) <= int(group_index.max()) < grid.groups(inputs):
            raise ValueError(f"g_idx names groups outside of 0 to {grid.groups(inputs) - 1}")
        codes = signed(unpack(tensors["qweight"].T, grid.bits, inputs), grid.bits)
        zeros = signed(self._zeros(tensors["qzeros"], grid.bits, outputs), grid.bits).T
        # the file's zeros count, whatever its settings say of symmetry
        plain = grid.symmetric and not zeros.any()
        return Quantized(codes, tensors["scales"].T.contiguous(), None if plain else zeros.contiguous(), group_index)

    def _zeros(self, packed: "torch.Tensor", bits: int, count: int) -> "torch.Tensor":
        """Zeros from 0 up, uint8 [groups, outputs]."""
        if self.version == 2:
            return unpack(packed, bits, count)
        if 32 % bits:
            return unpack(packed, bits, count) + 1 & (1 << bits) - 1
        ones = sum(1 << place for place in range(0, 32, bits))
        return unpack(packed + ones, bits, count)


V1, V2 = Gptq(1), Gptq(2)


def _entries(scheme: Scheme) -> dict[str, Any]:
    grid = scheme.grid
    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": scheme.ordered,
    }


def _pattern(layer: str) -> str:
    """A pattern that fits a layer's name, and the name it has fused with others."""
    module, dot, last = layer.rpartition(".")
    names = f"({last}|{FUSED[last]})" if last in FUSED else re.escape(last)
    return f"^{re.escape(module + dot)}{names}$"


def _scheme(settings: Mapping[str, Any]) -> Scheme:
    bits, size = entry(settings, "bits", int), entry(settings, "group_size", int)
    if bits not in BITS:
        raise QuantizedInput(f"codes of {bits} bits")
    if size == 0 or size < -1:
        raise ValueError(f"groups of {size} are none")
    return Scheme(Grid(bits, size, entry(settings, "sym", bool)), entry(settings, "desc_act", bool))


def _rules(settings: Mapping[str, Any]) -> list[Rule]:
    """Which layers are stored in another way, the first that fits counts: GPTQModel's rules, and AutoRound's."""
    rules: list[Rule] = []
    dynamic = entry(settings, "dynamic", dict, {})
    for text in dynamic:
        if not text.startswith("-:"):  # layers that are not packed, which their tensors tell too
            rules.append((pattern(text.removeprefix("+:")), entry(dynamic, text, dict)))
    extra = entry(settings, "extra_config", dict, {})
    for layer in extra:
        exact = re.escape(layer) if re.fullmatch(r"[\w.]+", layer) else layer
        rules.append((pattern(f"(?:{exact})$"), entry(extra, layer, dict)))
    return rules


def _override(layer: str, rules: list[Rule]) -> dict[str, Any]:
    override = next((override for rule, override in rules if rule.match(layer)), {})
    return {key: override[key] for key in OVERRIDES if key in override}


def _listed(numbers: Collection[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"
