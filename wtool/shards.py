"""The layout of an output on disk, made before any data: which tensors go into which file, and each file's header."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wtool.checkpoint.base import TensorInfo
from wtool.dtypes import itemsize

ALIGNMENT = 4096  # bytes, of the data in its file
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One output file: its header's bytes, and where each tensor's data begins in the file."""

    filename: str
    header: bytes
    offsets: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    size: int  # bytes


def plan_shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[Shard]:
    """Divide tensors, in their order, into files of at most `max_bytes` of data (a larger tensor gets its own)."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if groups[-1] and filled + info.nbytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    if len(groups) == 1:
        return [_lay_out("model.safetensors", groups[0])]
    return [_lay_out(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, 1)]


def _lay_out(filename: str, tensors: Mapping[str, TensorInfo]) -> Shard:
    # wider types first keeps every tensor aligned to its element size, as readers by memory map want
    ordered = sorted(tensors.items(), key=lambda item: -itemsize(item[1].dtype))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for name, info in ordered:
        begins[name] = position
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # so that large tensors can be written and mapped page by page
    header = struct.pack("<Q", len(text)) + text
    return Shard(
        filename=filename,
        header=header,
        offsets={name: len(header) + begin for name, begin in begins.items()},
        tensors=dict(ordered),
        size=len(header) + position,
    )


def index_of(shards: Sequence[Shard]) -> bytes:
    """The index file of a sharded checkpoint."""
    weight_map = {name: shard.filename for shard in shards for name in shard.tensors}
    total = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    return json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def json_bytes(content: object) -> bytes:
    """JSON for people: indented, unescaped, with a newline at the end."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
