"""Checkpoints in quantized formats for tests: every linear layer of a saved model rounded to nearest and packed."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from wtool.dtypes import torch_dtype
from wtool.formats import FORMATS, Scheme
from wtool.grid import Quantized, encode, fit
from wtool.shards import json_bytes


def rounded(weight, scheme: Scheme, dtype: str = "F16") -> Quantized:
    """A matrix rounded to nearest on a scheme's grid, with scales of a type."""
    scales, zeros = fit(weight, scheme.grid, dtype=torch_dtype(dtype))
    index = scheme.grid.group_index(weight.shape[1])
    return Quantized(encode(weight, scales, zeros, index, scheme.grid), scales, zeros, index)


def write_quantized(
    model: Path, folder: Path, name: str, scheme_of: Callable[[str], Scheme | None], dtype: str = "F32"
) -> dict[str, Quantized]:
    """Write a saved model in a format of `FORMATS`.

    scheme_of: by the name of a linear layer; None leaves it plain
    dtype: of the model; it becomes that of the scales as the format has it
    returns: what each packed layer holds
    """
    format = FORMATS[name]
    folder.mkdir()
    held, stored, schemes, plain = {}, {}, {}, ["lm_head"]
    for tensor, value in load_file(model / "model.safetensors").items():
        layer = tensor.removesuffix(".weight")
        scheme = scheme_of(layer) if layer.endswith("_proj") else None
        if scheme is None:
            stored[tensor] = value.to(torch_dtype(dtype))
            plain += [layer] if layer.endswith("_proj") else []
            continue
        outputs, inputs = value.shape
        assert format.unfit((outputs, inputs), scheme) is None
        held[layer], schemes[layer] = rounded(value, scheme, format.scale_dtype(dtype)), scheme
        stored |= {f"{layer}.{suffix}": part for suffix, part in format.encode(held[layer], scheme).items()}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    settings = format.settings(schemes, plain)
    for file, content in {
        "config.json": {**config, "quantization_config": settings},
        **format.files(settings),
    }.items():
        (folder / file).write_bytes(json_bytes(content))
    return held
