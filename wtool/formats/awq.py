"""AWQ, version "gemm": the format of AutoAWQ, which GPTQModel and vLLM read too; codes of 4 bits with zeros.

Of a linear layer with R outputs, C inputs and G groups:

    qweight  int32 [C, R / 8]   codes from 0 up, packed along the outputs
    qzeros   int32 [G, R / 8]   zeros from 0 up, packed likewise
    scales   float16 [G, R]

A word holds eight neighbouring outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, the first in its lowest bits. Groups are of
neighbours. The scales of input features that AWQ finds are in the tensors before the layer, and leave no trace here.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from wtool.dtypes import TensorInfo
from wtool.errors import QuantizedInput
from wtool.formats.bits import pack, signed, unpack, unsigned
from wtool.formats.scheme import Format, Scheme, Shape, entry
from wtool.grid import Grid, Quantized

if TYPE_CHECKING:
    import torch

METHOD = "awq"
BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output at each place of a word


class Awq(Format):
    """The format as this file's header has it."""

    packed, scales = "qweight", "scales"
    suffixes = ("qweight", "qzeros", "scales")
    mixed = False

    def unfit(self, shape: Shape, scheme: Scheme) -> str | None:
        (outputs, inputs), grid = shape, scheme.grid
        if grid.bits != BITS:
            return f"awq has codes of 4 bits, not {grid.bits}: take compressed-tensors"
        if scheme.ordered:
            return "awq has no groups ordered by activation: take static groups"
        if outputs % PER_WORD:
            return f"its {outputs} outputs are no multiple of 8, as awq asks: take compressed-tensors"
        if inputs % grid.width(inputs):
            return f"groups of {grid.group_size} do not divide its {inputs} inputs, as awq asks: take smaller ones"
        return None

    def scale_dtype(self, dtype: str) -> str:
        return "F16"

    def layout(self, shape: Shape, scheme: Scheme, scale_dtype: str) -> dict[str, TensorInfo]:
        outputs, inputs = shape
        groups = scheme.grid.groups(inputs)
        return {
            "qweight": TensorInfo("I32", (inputs, outputs // PER_WORD)),
            "qzeros": TensorInfo("I32", (groups, outputs // PER_WORD)),
            "scales": TensorInfo(scale_dtype, (groups, outputs)),
        }

    def encode(self, quantized: Quantized, scheme: Scheme) -> "dict[str, torch.Tensor]":
        import torch

        zeros = quantized.zeros
        if zeros is None:
            zeros = torch.zeros_like(quantized.scales, dtype=torch.int8)
        return {
            "qweight": _packed(quantized.codes),
            "qzeros": _packed(zeros),
            "scales": quantized.scales.T.contiguous(),
        }

    def settings(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        size = next(iter(schemes.values())).grid.group_size  # there is one for all layers
        return {
            "quant_method": METHOD,
            "bits": BITS,
            "group_size": size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain),
        }

    def schemes(self, settings: Mapping[str, Any]) -> Callable[[str], Scheme]:
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise QuantizedInput(f"version {version}")
        bits = entry(settings, "bits", int) if "bits" in settings else entry(settings, "w_bit", int)
        size = entry(settings, "group_size", int) if "group_size" in settings else entry(settings, "q_group_size", int)
        if bits != BITS:
            raise QuantizedInput(f"codes of {bits} bits")
        if size == 0 or size < -1:
            raise ValueError(f"groups of {size} are none")
        scheme = Scheme(Grid(BITS, size, symmetric=False))
        return lambda layer: scheme

    def shape(
        self, infos: Mapping[str, TensorInfo], scheme: Scheme, read: "Callable[[str], torch.Tensor | None]"
    ) -> Shape:
        inputs, words = infos["qweight"].shape
        return words * PER_WORD, inputs

    def decode(self, tensors: "Mapping[str, torch.Tensor]", scheme: Scheme, shape: Shape) -> Quantized:
        outputs, inputs = shape
        codes, zeros = (_unpacked(tensors[suffix], outputs) for suffix in ("qweight", "qzeros"))
        # the file's zeros count: where none is, the grid was symmetric
        index = scheme.grid.group_index(inputs)
        return Quantized(codes, tensors["scales"].T.contiguous(), zeros if zeros.any() else None, index)


FORMAT = Awq()


def _packed(codes: "torch.Tensor") -> "torch.Tensor":
    """Words [n, out / 8] of signed codes [out, n]."""
    octets = unsigned(codes.T, BITS).unflatten(1, (-1, PER_WORD))
    return pack(octets[..., list(ORDER)].flatten(1), BITS)


def _unpacked(words: "torch.Tensor", outputs: int) -> "torch.Tensor":
    """Undo `_packed`."""
    octets = unpack(words, BITS, outputs).unflatten(1, (-1, PER_WORD))
    places = [ORDER.index(number) for number in range(PER_WORD)]
    return signed(octets[..., places].flatten(1), BITS).T.contiguous()
