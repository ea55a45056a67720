"""Weights of 8-bit floats with scales beside them (DeepSeek's blocks, compressed-tensors, plain): decoded on reading.

A tensor `P` of such a type stands for `P` times its scales, which are `P_scale_inv` (an inverse by name only) or
`P_scale`: one for all of it, one for each row, or one for each block. Scales of what comes into a layer say nothing
of its weight, and are left out with it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import Checkpoint, TensorInfo, View
from wtool.dtypes import DTYPES, FLOATS
from wtool.errors import MalformedFile, MissingInput, QuantizedInput

if TYPE_CHECKING:
    import torch

    from wtool.formats.fp8 import Blocks

CODES = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
SCALE_NAMES = ("_scale_inv", "_scale")  # after the weight's name
OF_INPUTS = ("input_scale", "activation_scale")  # beside the weight
USUAL = (128, 128)


def has_float8(checkpoint: Checkpoint) -> bool:
    """Whether there are tensors of 8-bit floats with scales."""
    held = checkpoint.tensors
    return any(info.dtype in CODES and _scale_of(name, held) for name, info in held.items())


def decoded_float8(checkpoint: Checkpoint) -> "Checkpoint | None":
    """The checkpoint as a plain one, where it has weights of 8-bit floats that its settings do not say more of.

    returns: None where it has none, or its settings are of a kind that is not read here
    raises: MalformedFile, MissingInput where settings and tensors do not go together
    """
    if not has_float8(checkpoint):
        return None
    try:
        size = _block_size(checkpoint.config.get("quantization_config"))
    except QuantizedInput:
        return None
    except ValueError as error:
        raise MalformedFile(f"{checkpoint.label}: config.json: quantization_config: {error}") from None
    return Float8(checkpoint, size)


@dataclass(frozen=True)
class Coded:
    """A tensor of codes."""

    scale: str  # the tensor of its scales
    shape: tuple[int, ...]  # of the scales, as many dimensions as the codes have
    blocks: "Blocks"


class Float8(View):
    """A checkpoint with weights of 8-bit floats that looks like a plain one.

    A weight is announced in the model's type and read in float32, as the product of code and scale that it is.
    size: of the blocks, where settings tell it
    """

    def __init__(self, stored: Checkpoint, size: tuple[int, int] | None):
        super().__init__(stored)
        self.config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
        held = stored.tensors
        self._coded = {name: self._examine(name, size) for name, info in held.items() if info.dtype in CODES}
        scales = {coded.scale for coded in self._coded.values()}
        scales |= {f"{name.rpartition('.')[0]}.{other}" for name in self._coded for other in OF_INPUTS}
        dtype = _model_dtype(stored)
        self.tensors = {
            name: TensorInfo(dtype, info.shape) if name in self._coded else info
            for name, info in held.items()
            if name not in scales
        }
        kinds = dict.fromkeys(str(coded.blocks) for coded in self._coded.values())
        self.quantization = f"FP8, {' or '.join(kinds)}, in {len(self._coded)} layer(s)"

    def _examine(self, name: str, size: tuple[int, int] | None) -> Coded:
        """Find a weight's scales, and which weights share one."""
        held = self.source.tensors
        scale = _scale_of(name, held)
        if scale is None:
            raise MissingInput(
                f"{self.label}: no tensor '{name}_scale': its weight is packed and cannot be read without"
            )
        code, info = held[name], held[scale]
        found = _blocks(code.shape, info.shape, size)
        if found is None or info.dtype not in SCALES:
            blocks = " x ".join(map(str, size or USUAL))
            raise MalformedFile(
                f"{self.label}: '{scale}' is {info.dtype} {list(info.shape)}; of a weight {list(code.shape)} it must "
                f"be floats: one, one for each row, or one for each block of {blocks}"
            )
        return Coded(scale, *found)

    def read(self, name: str) -> "torch.Tensor":
        coded = self._coded.get(name)
        if coded is None:
            if name not in self.tensors:
                raise self.missing(name)
            return self.source.read(name)
        from wtool.formats.fp8 import decode

        codes, scales = self.source.read(name), self.source.read(coded.scale)
        if codes.dim() < 2:
            return codes.float() * scales.float().reshape(())
        return decode(codes, scales.reshape(coded.shape), coded.blocks)

    def parts(self, name: str) -> Iterable[str]:
        return (name, self._coded[name].scale) if name in self._coded else (name,)


def _scale_of(name: str, held: Mapping[str, TensorInfo]) -> str | None:
    return next((name + ending for ending in SCALE_NAMES if name + ending in held), None)


def _blocks(
    codes: tuple[int, ...], scales: tuple[int, ...], size: tuple[int, int] | None
) -> "tuple[tuple[int, ...], Blocks] | None":
    """The shape of the scales in as many dimensions as the codes have, and which weights share one; None if neither.

    size: of the blocks, where it is known
    """
    from wtool.formats.fp8 import Blocks

    if len(codes) < 2:
        return ((), Blocks(-1, -1)) if set(scales) <= {1} else None
    *experts, rows, columns = codes
    for blocks in (Blocks(*(size or USUAL)), Blocks(-1, -1), Blocks(1, -1)):
        if scales == (*experts, *blocks.count((rows, columns))):
            return scales, blocks
    if scales == codes[:-1]:
        return (*scales, 1), Blocks(1, -1)
    if set(scales) <= {1} and not experts:
        return (1, 1), Blocks(-1, -1)
    return None


def _block_size(settings: Any) -> tuple[int, int] | None:
    """The size of blocks that a `quantization_config` tells; None where it tells none.

    raises: with a clause each, QuantizedInput for a kind that is not read here, ValueError for what makes no sense
    """
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError("is no object")
    method = str(settings.get("quant_method", "unnamed")).lower()
    if method == "compressed-tensors":
        return _of_groups(settings)
    if method == "modelopt" and settings.get("quant_algo") != "FP8" or method not in ("fp8", "fbgemm_fp8", "modelopt"):
        raise QuantizedInput(method)
    size = settings.get("weight_block_size")
    return None if size is None else _pair(size, "weight_block_size")


def _of_groups(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """The same for compressed-tensors."""
    from wtool.formats.compressed_tensors import refuse_what_changes_the_network
    from wtool.formats.scheme import entry

    refuse_what_changes_the_network(settings)
    sizes: set[tuple[int, int]] = set()
    for group in entry(settings, "config_groups", dict).values():
        weights = entry(group, "weights", dict) if isinstance(group, dict) else {}
        kind = weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True)
        if kind != ("float", 8, True) or weights.get("scale_dtype"):
            raise QuantizedInput(f"weights as {group.get('format') if isinstance(group, dict) else group}")
        if weights.get("strategy") == "block":
            sizes.add(_pair(weights.get("block_structure"), "block_structure"))
        elif weights.get("strategy") == "group":
            sizes.add((1, entry(weights, "group_size", int)))
    if len(sizes) > 1:
        raise QuantizedInput("blocks of several sizes")
    return next(iter(sizes), None)


def _pair(value: Any, key: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"'{key}' is {value!r}, not two numbers above 0")
    return value[0], value[1]


def _model_dtype(checkpoint: Checkpoint) -> str:
    """The type of the model: as config.json says, else that of most of what is not coded, else bfloat16."""
    text = checkpoint.config.get("text_config")
    places = [checkpoint.config, text] if isinstance(text, dict) else [checkpoint.config]
    told = [place[key] for place in places for key in ("dtype", "torch_dtype") if key in place]
    if found := next((name for name in FLOATS if DTYPES[name][1] in told), None):
        return found
    sizes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype in FLOATS and not name.endswith((*SCALE_NAMES, *OF_INPUTS)):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.elements
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "BF16"
