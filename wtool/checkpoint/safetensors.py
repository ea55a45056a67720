"""safetensors files: the header read and checked, the data mapped and never copied.

Format (the safetensors package's documentation, section "Format"): 8 bytes little-endian header length, JSON header,
tensor data. The header is parsed here, and not by the safetensors package, because a header alone must do for files
that are not on this machine, and because a damaged file must be named in words. The rules checked are those of the
package: offsets in order, no hole, no overlap, sizes that agree with shape and dtype, nothing after the last tensor.
"""

import hashlib
import json
import mmap
import struct
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import TensorFile, TensorInfo
from wtool.dtypes import DTYPES, torch_dtype
from wtool.errors import MalformedFile

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package
PAGE = mmap.PAGESIZE

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Header:
    """A safetensors header: the tensors in the order of their data, and where each lies."""

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]  # bytes from the start of the data
    metadata: Mapping[str, str]
    data_start: int  # bytes from the start of the file
    data_size: int  # bytes
    digest: str


def header_length(first_bytes: bytes, file_size: int, where: object) -> int:
    """Read the header's length from a file's first 8 bytes."""
    if len(first_bytes) < 8:
        raise MalformedFile(f"{where}: {file_size} bytes is too short for a safetensors file")
    (length,) = struct.unpack("<Q", first_bytes[:8])
    if length > MAX_HEADER:
        raise MalformedFile(f"{where}: header length {length:,} is beyond {MAX_HEADER:,}: not a safetensors file")
    if 8 + length > file_size:
        raise MalformedFile(f"{where}: cut short: the header needs {8 + length:,} bytes, the file has {file_size:,}")
    return length


def parse_header(raw: bytes, file_size: int, where: object) -> Header:
    """Parse and check a header (without the 8 length bytes) against the size of its file.

    where: how an error names the file
    raises: MalformedFile
    """
    try:
        entries = json.loads(raw, object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise MalformedFile(f"{where}: header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise MalformedFile(f"{where}: header is a JSON {type(entries).__name__}, not an object")
    metadata = entries.pop("__metadata__", None) or {}
    found: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in entries.items():
        begin, end, info = _parse_entry(name, entry, where)
        found.append((begin, end, name, info))
    found.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, name, _ in found:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise MalformedFile(f"{where}: tensor '{name}' at byte {begin:,} {what} (expected {position:,})")
        position = end
    data_start = 8 + len(raw)
    if data_start + position != file_size:
        what = "cut short" if data_start + position > file_size else "has bytes after the last tensor"
        raise MalformedFile(
            f"{where}: {what}: the header describes {data_start + position:,} bytes, the file has {file_size:,}"
        )
    return Header(
        tensors={name: info for _, _, name, info in found},
        offsets={name: begin for begin, _, name, _ in found},
        metadata=metadata,
        data_start=data_start,
        data_size=position,
        digest=hashlib.sha256(raw).hexdigest(),
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
    return entries


def _parse_entry(name: str, entry: Any, where: object) -> tuple[int, int, TensorInfo]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sound = False
        dtype, shape, begin, end = "", (), 0, 0
    if not sound:
        raise MalformedFile(f"{where}: tensor '{name}': its header entry needs dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise MalformedFile(f"{where}: tensor '{name}' has the unknown dtype '{dtype}'")
    info = TensorInfo(dtype, shape)
    if end - begin != info.nbytes:
        raise MalformedFile(
            f"{where}: tensor '{name}' spans {end - begin:,} bytes, but {dtype} {list(shape)} takes {info.nbytes:,}"
        )
    return begin, end, info


def read_header(path: Path) -> Header:
    """Read and check the header of a file on disk."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_length(file.read(8), size, path)
        return parse_header(file.read(length), size, path)


class SafetensorsFile(TensorFile):
    """A safetensors file on disk, mapped at the first read."""

    def __init__(self, path: Path):
        self.path = path
        self.header = read_header(path)
        self.tensors = self.header.tensors

    def digest(self) -> str:
        return self.header.digest

    @cached_property
    def _mapping(self) -> tuple[mmap.mmap, "torch.Tensor"]:
        """The mapped file, and all of it as one tensor of bytes that the tensors are views of."""
        import torch

        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with _one_at_a_time, warnings.catch_warnings():  # which is not safe in several threads
            warnings.simplefilter("ignore")  # torch warns that the memory is read-only: that is what we want
            return mapped, torch.frombuffer(mapped, dtype=torch.uint8)

    def read(self, name: str) -> "torch.Tensor":
        import torch

        info = self.tensors[name]
        dtype = torch_dtype(info.dtype)
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        begin = self.header.data_start + self.header.offsets[name]
        data = self._mapping[1][begin : begin + info.nbytes]
        if data.data_ptr() % dtype.itemsize:  # the format does not promise alignment
            data = data.clone()
        return data.view(dtype).view(info.shape)

    def _pages(self, name: str) -> tuple[int, int]:
        """The range of whole pages that hold nothing but this tensor: start and length."""
        begin = self.header.data_start + self.header.offsets[name]
        first = -(-begin // PAGE) * PAGE
        return first, (begin + self.tensors[name].nbytes) // PAGE * PAGE - first

    def prefetch(self, name: str) -> None:
        first, length = self._pages(name)
        if length > 0:
            self._mapping[0].madvise(mmap.MADV_WILLNEED, first, length)

    def forget(self, name: str) -> None:
        first, length = self._pages(name)
        if length > 0:
            self._mapping[0].madvise(mmap.MADV_DONTNEED, first, length)
