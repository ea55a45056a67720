"""The element types of a checkpoint: their safetensors names, sizes and torch types; and what a header says.

Names are the currency of headers and plans, so that both can be made without torch.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from wtool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

# safetensors name -> (bits per element, name of the torch type)
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
FLOATS = ("F16", "BF16", "F32", "F64")  # the types weights are computed in

_BY_TORCH_NAME = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
_SHORT = {"fp16": "F16", "half": "F16", "bf16": "BF16", "fp32": "F32", "float": "F32", "fp64": "F64", "double": "F64"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: str  # safetensors name, e.g. "BF16"
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * itemsize(self.dtype)


def itemsize(dtype: str) -> int:
    """Bytes per element of a safetensors type name."""
    return DTYPES[dtype][0] // 8


def torch_dtype(dtype: str) -> "torch.dtype":
    """The torch type of a safetensors type name."""
    import torch

    return getattr(torch, DTYPES[dtype][1])


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch type."""
    return _BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def config_name(dtype: str) -> str:
    """How `config.json` spells a type: `bfloat16` for BF16."""
    return DTYPES[dtype][1]


def parse_float_dtype(text: str) -> str:
    """Read a user's spelling (`bfloat16`, `bf16`, `BF16`) of a type weights can be stored in."""
    name = text.lower().removeprefix("torch.")
    found = _SHORT.get(name) or _BY_TORCH_NAME.get(name) or (text.upper() if text.upper() in DTYPES else None)
    if found not in FLOATS:
        spellings = [config_name(dtype) for dtype in FLOATS]
        raise UsageError(f"dtype '{text}' is not one of {', '.join(spellings)}{did_you_mean(name, spellings)}")
    return found


def promote(dtypes: list[str]) -> str:
    """The smallest float type that holds every value of all of them (bfloat16 with float16 gives float32)."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return dtypes[0]
    return "F64" if "F64" in distinct else "F32"
