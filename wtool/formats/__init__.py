"""How compressed weights lie on disk: packing and unpacking side by side, one file a format.

| --format           | codes           | grids                       | read by                                |
|--------------------|-----------------|-----------------------------|----------------------------------------|
| compressed-tensors | 2 to 8 bits     | all whose groups divide     | transformers, vLLM                     |
| gptq               | 2, 3, 4, 8 bits | symmetric                   | GPTQModel, AutoGPTQ, vLLM (4 and 8)    |
| gptq_v2            | 2, 3, 4, 8 bits | all                         | GPTQModel                              |
| awq                | 4 bits          | all whose groups divide     | GPTQModel, vLLM                        |

bits    codes as a dense stream of bits
fp8     8-bit floats under scales, which are no grid: names, settings and rounding of their own
gguf    llama.cpp's blocks, which are no grid: a table of their own
scheme  what formats have in common: Scheme, and what a Format can do
"""

from collections.abc import Callable, Mapping
from typing import Any

from wtool.errors import QuantizedInput
from wtool.formats import awq, compressed_tensors, gptq
from wtool.formats.scheme import Format as Format
from wtool.formats.scheme import Scheme as Scheme
from wtool.formats.scheme import Shape as Shape

FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors.FORMAT,
    "gptq": gptq.V1,
    "gptq_v2": gptq.V2,
    "awq": awq.FORMAT,
}
AUTOROUND = ("auto-round", "autoround", "intel/auto-round")


def reader(settings: Mapping[str, Any]) -> tuple[str, Format, Callable[[str], Scheme]]:
    """What reads the weights that a config.json's `quantization_config` describes.

    returns: the format's name, the format, and each layer's scheme by its name (see `Format.schemes`)
    raises: with a clause each, QuantizedInput where nothing here does, ValueError where the settings make no sense
    """
    name = _name(settings)
    if name not in FORMATS:
        raise QuantizedInput(name)
    return name, FORMATS[name], FORMATS[name].schemes(settings)


def _name(settings: Mapping[str, Any]) -> str:
    method = str(settings.get("quant_method", "unnamed")).lower()
    if method in AUTOROUND:
        packing = str(settings.get("packing_format", "unnamed packing"))
        return "gptq" if "gptq" in packing and settings.get("data_type", "int") == "int" else packing
    if method != "gptq":
        return method
    if settings.get("is_marlin_format"):
        return "marlin"
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
