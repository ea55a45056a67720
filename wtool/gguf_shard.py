"""The layout of a GGUF file, made before any data: its header's bytes, and where each tensor begins.

Format: magic, version and counts; metadata; a table of tensors; the data, each tensor aligned
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wtool.checkpoint.base import TensorInfo
from wtool.shards import Shard

VERSION = 3
ALIGNMENT = 32  # bytes, of every tensor in the file
# The metadata value types that are written: a number for each Python type, and the letter `struct` has for it
KINDS: dict[type, tuple[int, str]] = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
IN_ARRAYS = {**KINDS, int: (5, "i")}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFLayout:
    """How a plan's outputs become one GGUF file; a tensor's data is bytes here, what they are stands in `types`."""

    filename: str
    metadata: Mapping[str, Any]  # bool, int (unsigned, 32 bits), float (32 bits), text, or a list of one of them
    types: Mapping[str, tuple[int, tuple[int, ...]]]  # ggml type, and shape with the outermost dimension first

    def __call__(self, outputs: Mapping[str, TensorInfo], max_bytes: int) -> list[Shard]:
        """Lay out all outputs in one file, however large: llama.cpp reads one."""
        offsets: dict[str, int] = {}
        position = 0
        table = b""
        for name, info in outputs.items():
            offsets[name] = position
            kind, shape = self.types[name]
            table += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, position)
            position = _aligned(position + info.nbytes)
        head = struct.pack("<4sIQQ", b"GGUF", VERSION, len(outputs), len(self.metadata))
        header = head + b"".join(_text(key) + _value(value) for key, value in self.metadata.items()) + table
        header += b"\0" * (_aligned(len(header)) - len(header))
        begins = {name: len(header) + offset for name, offset in offsets.items()}
        return [Shard(self.filename, header, begins, dict(outputs), len(header) + position)]


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + _text(value)
    if isinstance(value, list):
        return struct.pack("<I", ARRAY) + _array(value)
    number, letter = KINDS[type(value)]
    return struct.pack(f"<I{letter}", number, value)


def _array(values: list[Any]) -> bytes:
    if values and isinstance(values[0], str):
        return struct.pack("<IQ", TEXT, len(values)) + b"".join(map(_text, values))
    number, letter = IN_ARRAYS[type(values[0]) if values else int]
    return struct.pack(f"<IQ{len(values)}{letter}", number, len(values), *values)
