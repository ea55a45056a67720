"""Packed weights are told by name, so that they are never taken for plain ones.

An FP8 checkpoint whose `weight_scale_inv` is dropped, or a GPTQ one whose `qweight` is averaged, gives a
model that loads and talks nonsense.
"""

from wtool.checkpoint.base import Checkpoint
from wtool.errors import QuantizedInput

# What packed formats put beside, or in the place of, a plain `weight`.
PACKED_SUFFIXES = (
    ".weight_scale_inv",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_packed",
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
    what = f"quantized ({method})" if method else "quantized"
    where = f"tensor '{tensor}' ({checkpoint.tensors[tensor].dtype})" if tensor else "config.json: quantization_config"
    raise QuantizedInput(
        f"{checkpoint.label}: {what}, see {where}; it cannot be read as plain weights: give the unquantized checkpoint"
    )
