"""Packed weights: decoded on reading where `wtool.formats` knows how, else told by name.

They must never be taken for plain ones: an FP8 checkpoint whose `weight_scale_inv` is dropped, or a GPTQ one whose
`qweight` is averaged, gives a model that loads and talks nonsense.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.adapter import CONV1D_FAMILIES
from wtool.checkpoint.base import Checkpoint, TensorInfo, View
from wtool.dtypes import DTYPES, FLOATS
from wtool.errors import MalformedFile, MissingInput, QuantizedInput

if TYPE_CHECKING:
    import torch

    from wtool.formats import Format, Scheme, Shape

SETTINGS = ("quantization_config", "wtool_low_rank")  # where config.json says that weights are not plain ones
# What packed formats put beside, or in the place of, a plain `weight`.
PACKED_SUFFIXES = (
    ".weight_scale_inv",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_packed",
    ".weight_zero_point",
    ".weight_global_scale",
    ".input_scale",
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".absmax",
    ".SCB",
    ".weight_blocks",
    "proj_blocks",
    "proj_scales",
    ".bitmask",
    ".low_rank_u",
    ".low_rank_v",
)
PACKED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise QuantizedInput for a checkpoint whose weights are packed in a format that has no decoder here."""
    settings = checkpoint.config.get("quantization_config")
    tensor = next((name for name in checkpoint.tensors if name.endswith(PACKED_SUFFIXES)), None)
    tensor = tensor or next((name for name, info in checkpoint.tensors.items() if info.dtype in PACKED_DTYPES), None)
    if tensor is None and settings is None:
        return
    method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else None
    what = f"quantized ({method}{_variety(settings)})" if isinstance(settings, dict) else "quantized"
    where = f"tensor '{tensor}' ({checkpoint.tensors[tensor].dtype})" if tensor else "config.json: quantization_config"
    raise QuantizedInput(
        f"{checkpoint.label}: {what}, see {where}; it cannot be read as plain weights: give the unquantized checkpoint"
    )


def _variety(settings: Mapping[str, Any]) -> str:
    """What it is of a format's varieties that is not read here; nothing where the whole format is not."""
    from wtool.formats import reader

    try:
        reader(settings)
    except (QuantizedInput, ValueError) as error:
        return "" if str(error) == settings.get("quant_method", "unnamed") else f", {error}"
    return ""


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a plain one, where its packed weights can be decoded; else itself.

    raises: MalformedFile, MissingInput where settings and tensors do not go together
    """
    from wtool.checkpoint.float8 import decoded_float8
    from wtool.checkpoint.rebuilt import rebuilt
    from wtool.formats import reader

    checkpoint = rebuilt(checkpoint)
    if (plain := decoded_float8(checkpoint)) is not None:
        return plain
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        return checkpoint
    if not isinstance(settings, dict):
        raise MalformedFile(f"{checkpoint.label}: config.json: quantization_config is no object")
    try:
        name, format, schemes = reader(settings)
    except QuantizedInput:
        return checkpoint
    except ValueError as error:
        raise MalformedFile(f"{checkpoint.label}: config.json: quantization_config: {error}") from None
    if not any(tensor.endswith(f".{format.packed}") for tensor in checkpoint.tensors):
        return checkpoint
    return Dequantized(checkpoint, name, format, schemes)


@dataclass(frozen=True)
class Packed:
    """A weight in the form it lies on disk."""

    layer: str
    scheme: "Scheme"
    shape: "Shape"  # outputs, inputs
    parts: Mapping[str, str]  # suffix -> tensor


class Dequantized(View):
    """A checkpoint with packed weights that looks like a plain one.

    A weight is announced in the model's type and read in float32, as the product of code and scale that it is.
    """

    def __init__(self, stored: Checkpoint, name: str, format: "Format", schemes: "Callable[[str], Scheme]"):
        super().__init__(stored)
        self._format, self._schemes = format, schemes
        self.config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
        self._packed: dict[str, Packed] = {}
        self._dtype = _model_dtype(stored.config)
        self._conv1d = stored.config.get("model_type") in CONV1D_FAMILIES
        self.tensors = self._announce()
        counts = Counter(packed.scheme for packed in self._packed.values())
        told = [f"{scheme} in {count} layer(s)" for scheme, count in counts.most_common()]
        self.quantization = f"{name} {'; '.join(told) if len(told) > 1 else next(iter(counts))}"

    # Headers

    def _announce(self) -> dict[str, TensorInfo]:
        """The tensors as they are to be seen, each weight in the place of the first of its parts."""
        tensors: dict[str, TensorInfo] = {}
        held, packed = self.source.tensors, self._format.packed
        layers = [name.rpartition(".")[0] for name in held if name.endswith(f".{packed}")]
        for layer in layers:
            if f"{layer}.weight" in held:
                raise MalformedFile(f"{self.label}: '{layer}' has both 'weight' and '{packed}'")
        of_part = {f"{layer}.{suffix}": layer for layer in layers for suffix in self._format.suffixes}
        for name, info in held.items():
            layer = of_part.get(name)
            if layer is None:
                tensors[name] = info
            elif (weight := f"{layer}.weight") not in tensors:
                self._packed[weight] = found = self._examine(layer)
                shape = found.shape[::-1] if self._is_turned(layer) else found.shape
                tensors[weight] = TensorInfo(self._dtype or held[found.parts[self._format.scales]].dtype, shape)
        return tensors

    def _examine(self, layer: str) -> Packed:
        """Find a weight's parts, and check that they are what its scheme says."""
        format, held = self._format, self.source.tensors
        names = {suffix: f"{layer}.{suffix}" for suffix in format.suffixes}
        infos = {suffix: held[name] for suffix, name in names.items() if name in held}
        try:
            scheme = self._schemes(layer)
        except (ValueError, QuantizedInput) as error:
            raise MalformedFile(f"{self.label}: config.json: quantization_config: '{layer}': {error}") from None
        for suffix in (format.packed, format.scales):
            self._check(
                names[suffix], f"2 dimensions for {scheme}", lambda info: len(info.shape) == 2 and info.elements
            )
        shape = format.shape(infos, scheme, lambda suffix: self._glance(names[suffix]))
        if min(shape) < 1:
            raise MalformedFile(f"{self.label}: '{layer}' would have the shape {list(shape)}")
        scale_dtype = infos[format.scales].dtype
        for suffix, info in format.layout(shape, scheme, scale_dtype if scale_dtype in FLOATS else "F32").items():
            dtypes = ("I32", "I64") if suffix in format.integers else (info.dtype,)
            right = [TensorInfo(dtype, info.shape) for dtype in dtypes]
            if suffix in infos or suffix not in format.optional:
                told = f"{info.dtype} {list(info.shape)} for {list(shape)} in {scheme}"
                self._check(names[suffix], told, right.__contains__)
        return Packed(layer, scheme, shape, {suffix: names[suffix] for suffix in infos})

    def _check(self, name: str, right: str, is_right: Callable[[TensorInfo], Any]) -> None:
        """Check the header of a part of a weight."""
        info = self.source.tensors.get(name)
        if info is None:
            raise MissingInput(f"{self.label}: no tensor '{name}': its weight is packed and cannot be read without")
        if not is_right(info):
            raise MalformedFile(f"{self.label}: '{name}' is {info.dtype} {list(info.shape)}, not {right}")

    def _glance(self, name: str) -> "torch.Tensor | None":
        """A small tensor that headers alone leave open; None where only headers are there."""
        try:
            return self.source.read(name)
        except MissingInput:
            return None

    def _is_turned(self, layer: str) -> bool:
        """Whether the plain weight has its inputs first; packed ones never do."""
        return self._conv1d and not layer.endswith("lm_head")

    # What a checkpoint can do

    def read(self, name: str) -> "torch.Tensor":
        packed = self._packed.get(name)
        if packed is None:
            if name not in self.tensors:
                raise self.missing(name)
            return self.source.read(name)
        parts = {suffix: self.source.read(part) for suffix, part in packed.parts.items()}
        try:
            weight = self._format.decode(parts, packed.scheme, packed.shape).values()
        except ValueError as error:
            raise MalformedFile(f"{self.label}: '{packed.layer}': {error}") from None
        return weight.T.contiguous() if self._is_turned(packed.layer) else weight

    def parts(self, name: str) -> Iterable[str]:
        return self._packed[name].parts.values() if name in self._packed else (name,)


def _model_dtype(config: Mapping[str, Any]) -> str | None:
    """The float type that config.json says the model is of."""
    text = config.get("text_config")
    places = [config, text] if isinstance(text, dict) else [config]
    told = [place[key] for place in places for key in ("dtype", "torch_dtype") if key in place]
    return next((name for name in FLOATS if DTYPES[name][1] in told), None)
