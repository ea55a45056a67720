"""GGUF files: llama.cpp's one-file models, mapped, one tensor dequantized at a time, under Hugging Face names.

Format: magic, version and counts; metadata; a table of tensors; the data, aligned
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The header is parsed here: the gguf package's reader
makes an object of every token of the vocabulary, which takes seconds, and runs on over the end of a damaged file.
Its tables of types and its dequantization are what this file builds on. config.json comes from the metadata
(`gguf_families`), the tokenizer's files from transformers, when they are asked for.
"""

import atexit
import hashlib
import mmap
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import Checkpoint, LazyFiles, TensorFile, TensorInfo
from wtool.checkpoint.folder import Folder
from wtool.checkpoint.gguf_families import ROPE_FREQS, config_of, family_of, hugging_face_name, llama3_rope
from wtool.console import remark
from wtool.dtypes import torch_dtype
from wtool.errors import MalformedFile, QuantizedInput, RuntimeProblem

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Metadata value types: the letter `struct` has for each fixed one, then the two others.
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
LONGEST_ARRAY = 4096  # elements; a longer one is a vocabulary, which only transformers' tokenizer needs
PLAIN = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}  # ggml type -> dtype
MANY_TOKENS = 100_000  # of which it takes transformers long to make a tokenizer: 262,144 took half a minute
PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file, and as what."""

    kind: int  # ggml type
    shape: tuple[int, ...]  # outermost dimension first, as torch has it
    begin: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class Header:
    metadata: Mapping[str, Any]  # long arrays and arrays of texts are None
    tensors: Mapping[str, Stored]  # by their names in the file, in the order of their data
    data_start: int


class _Cursor:
    """Reads a header from its first byte to its last, and never beyond the file."""

    def __init__(self, data: mmap.mmap, where: object):
        self.data = data
        self.where = where
        self.position = 0

    def numbers(self, letters: str) -> tuple[Any, ...]:
        try:
            found = struct.unpack_from("<" + letters, self.data, self.position)
        except struct.error:
            raise self.cut() from None
        self.position += struct.calcsize("<" + letters)
        return found

    def number(self, letter: str) -> Any:
        return self.numbers(letter)[0]

    def skip(self, nbytes: int) -> int:
        """Step over bytes; return where they began."""
        begin = self.position
        self.position += nbytes
        if self.position > len(self.data):
            raise self.cut()
        return begin

    def text(self) -> str:
        """A text in one line: a damaged name must not break the error that quotes it."""
        length = self.number("Q")
        begin = self.skip(length)
        letters = self.data[begin : begin + length].decode(errors="replace")
        return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in letters)

    def value(self, kind: int) -> Any:
        if kind in FIXED:
            return self.number(FIXED[kind])
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            return self.array()
        raise MalformedFile(f"{self.where}: damaged header: metadata of the unknown type {kind}")

    def array(self) -> list[Any] | None:
        kind, count = self.numbers("IQ")
        if kind == TEXT:
            for _ in range(count):
                self.skip(self.number("Q"))
            return None
        if kind not in FIXED:
            raise MalformedFile(f"{self.where}: damaged header: an array of the unknown type {kind}")
        if count > LONGEST_ARRAY:
            self.skip(count * struct.calcsize("<" + FIXED[kind]))
            return None
        return list(self.numbers(f"{count}{FIXED[kind]}"))

    def cut(self) -> MalformedFile:
        return MalformedFile(
            f"{self.where}: cut short or damaged: the header does not end within the file's {len(self.data):,} bytes"
        )


def read_header(data: mmap.mmap, where: object) -> Header:
    """Read and check a header against the size of its file.

    where: how an error names the file
    raises: MalformedFile, QuantizedInput
    """
    cursor = _Cursor(data, where)
    if data[:4] != MAGIC:
        raise MalformedFile(f"{where}: not a GGUF file: begins with {data[:4]!r}, not {MAGIC!r}")
    cursor.skip(4)
    version, tensor_count, pair_count = cursor.numbers("IQQ")
    if version not in VERSIONS:
        what = "big-endian" if version > 0xFFFF else f"version {version}"
        raise QuantizedInput(f"{where}: {what} GGUF, which is not read here (known: little-endian versions 2 and 3)")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    entries: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        shape = cursor.numbers(f"{dimensions}Q")[::-1]
        entries.append((name, shape, *cursor.numbers("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise MalformedFile(f"{where}: damaged header: alignment {alignment}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        stored = Stored(kind, shape, data_start + offset, _nbytes(name, shape, kind, where))
        if name in tensors:
            raise MalformedFile(f"{where}: tensor '{name}' is there twice")
        if stored.begin + stored.nbytes > len(data):
            raise MalformedFile(
                f"{where}: cut short: tensor '{name}' ends at byte {stored.begin + stored.nbytes:,}, "
                f"the file has {len(data):,} (download not finished?)"
            )
        tensors[name] = stored
    return Header(metadata, tensors, data_start)


def _nbytes(name: str, shape: tuple[int, ...], kind: int, where: object) -> int:
    """The bytes a tensor takes: blocks of elements, packed along the last dimension."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in list(GGMLQuantizationType):
        raise QuantizedInput(f"{where}: tensor '{name}' has the ggml type {kind}, which the gguf package does not know")
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    rows = 1
    for length in shape[:-1]:
        rows *= length
    row = shape[-1] if shape else 1
    if row % elements:
        what = f"{GGMLQuantizationType(kind).name} rows of {row:,}, not a multiple of {elements}"
        raise MalformedFile(f"{where}: tensor '{name}' has {what}")
    return rows * (row // elements) * nbytes


class GGUFFile(TensorFile):
    """A GGUF file on disk, its tensors under their Hugging Face names."""

    def __init__(self, path: Path):
        _require_gguf(path)
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise MalformedFile(f"{path}: {path.stat().st_size} bytes is too short for a GGUF file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.header = read_header(self._map, path)
        metadata, tensors = self.header.metadata, self.header.tensors
        self.family = family_of(metadata, path)
        self.config = config_of(self.family, metadata, {name: tensor.shape for name, tensor in tensors.items()}, path)
        if ROPE_FREQS in tensors:
            divisors = self._values(tensors[ROPE_FREQS]).flatten().tolist()
            self.config["rope_scaling"] = llama3_rope(divisors, self.config.get("rope_theta", 10000.0), path)
        self._stored = {
            hugging_face_name(self.family, name, path): tensor for name, tensor in tensors.items() if name != ROPE_FREQS
        }
        self.tensors = {
            name: TensorInfo(PLAIN.get(tensor.kind, "F32"), tensor.shape) for name, tensor in self._stored.items()
        }

    def digest(self) -> str:
        return hashlib.sha256(self._map[: self.header.data_start]).hexdigest()

    def read(self, name: str) -> "torch.Tensor":
        values = self._values(self._stored[name])
        if self.family.norm_offset and name.endswith("norm.weight"):
            return values.float() - self.family.norm_offset
        if self.family.interleaved and ".q_proj." in name:
            return _undo_interleaving(values, self.config["num_attention_heads"])
        if self.family.interleaved and ".k_proj." in name:
            return _undo_interleaving(values, self.config["num_key_value_heads"])
        return values

    def _values(self, stored: Stored) -> "torch.Tensor":
        """A tensor's values as the file has them: a copy, in float32 if they are packed."""
        import numpy as np
        import torch
        from gguf import GGMLQuantizationType, quants

        raw = np.frombuffer(self._map, np.uint8, stored.nbytes, stored.begin)
        if stored.kind in PLAIN:
            return torch.from_numpy(raw.copy()).view(torch_dtype(PLAIN[stored.kind])).view(stored.shape)
        kind = GGMLQuantizationType(stored.kind)
        rows = TensorInfo("U8", stored.shape[:-1]).elements
        try:
            return torch.from_numpy(quants.dequantize(raw.reshape(rows, -1), kind)).view(stored.shape)
        except NotImplementedError:
            raise QuantizedInput(
                f"{self.path}: holds {kind.name} weights, which the gguf package cannot unpack"
            ) from None

    def _pages(self, name: str) -> tuple[int, int]:
        """The range of whole pages that hold nothing but this tensor: start and length."""
        stored = self._stored[name]
        first = -(-stored.begin // PAGE) * PAGE
        return first, (stored.begin + stored.nbytes) // PAGE * PAGE - first

    def prefetch(self, name: str) -> None:
        first, length = self._pages(name)
        if length > 0:
            self._map.madvise(mmap.MADV_WILLNEED, first, length)

    def forget(self, name: str) -> None:
        first, length = self._pages(name)
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


def _undo_interleaving(values: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Put the rows of each head back in halves: [heads * dim, ...] from pairs (0, dim/2), (1, dim/2 + 1), …"""
    pairs = values.view(heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def open_gguf(path: Path, label: str) -> Checkpoint:
    """Open a GGUF file as a checkpoint, with the config.json and the tokenizer files it stands for."""
    file = GGUFFile(path)
    has_tokenizer = "tokenizer.ggml.model" in file.header.metadata
    files = LazyFiles(lambda: _tokenizer_files(path, file.config["vocab_size"])) if has_tokenizer else {}
    return Folder(label, path, [file], file.config, files)


def _tokenizer_files(path: Path, tokens: int) -> dict[str, Path]:
    """The tokenizer's files as transformers writes them, in a folder that is there as long as this process."""
    if tokens > MANY_TOKENS:
        remark(f"{path}: making a tokenizer of its {tokens:,} tokens; this takes a while")
    from transformers import AutoTokenizer

    folder = Path(tempfile.mkdtemp(prefix="wtool-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, target = folder / "source", folder / "files"
    source.mkdir()
    (source / "model.gguf").symlink_to(path.resolve())  # alone, so that no tokenizer beside the file is mixed in
    try:
        AutoTokenizer.from_pretrained(source, gguf_file="model.gguf").save_pretrained(target)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise QuantizedInput(f"{path}: transformers cannot read its tokenizer: {reason}") from None
    return {file.name: file for file in sorted(target.iterdir())}


def _require_gguf(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise RuntimeProblem(f"{path}: reading GGUF needs the gguf package: pip install 'wtool[gguf]'") from None
