"""A checkpoint in a local folder, or in a single file: safetensors, torch .bin or GGUF, whole or in shards."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import Checkpoint, FileIdentity, TensorFile
from wtool.checkpoint.made import made_as
from wtool.checkpoint.safetensors import SafetensorsFile
from wtool.errors import MalformedFile, MissingInput

if TYPE_CHECKING:
    import torch

# Everything that comes with a tokenizer, and goes with it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
# What stands beside the weights and belongs to the model. Weights, and whatever else a repository holds
# (images, training state), do not.
SIDE_FILES = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
)
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = (SINGLES[0], INDEXES[0], SINGLES[1], INDEXES[1])  # the first there is counts, as in transformers


class Folder(Checkpoint):
    """Tensor files on disk, taken together."""

    def __init__(
        self,
        label: str,
        place: Path,
        files: Sequence[TensorFile],
        config: dict[str, Any],
        side_files: Mapping[str, Path],
    ):
        self.label = label
        self.place = place  # the folder, or the single file
        self.config = config
        self.files = side_files
        self._tensor_files = tuple(files)
        self._file_of: dict[str, TensorFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self._file_of:
                    raise MalformedFile(
                        f"{label}: tensor '{name}' is both in {self._file_of[name].path} and {file.path}"
                    )
                self._file_of[name] = file
        self.tensors = {name: file.tensors[name] for name, file in self._file_of.items()}

    def _file(self, name: str) -> TensorFile:
        try:
            return self._file_of[name]
        except KeyError:
            raise self.missing(name) from None

    def read(self, name: str) -> "torch.Tensor":
        return self._file(name).read(name)

    def prefetch(self, name: str) -> None:
        self._file(name).prefetch(name)

    def expect(self, names: Iterable[str]) -> None:
        for name in names:
            self._file(name).expect([name])

    def forget(self, name: str) -> None:
        self._file(name).forget(name)

    def folders(self) -> list[Path]:
        return [self.place.resolve()]

    def identity(self) -> list[FileIdentity]:
        made = self.revision or made_as(self.place, [file.path for file in self._tensor_files])
        found = [file.identity() for file in self._tensor_files]
        return [replace(each, version=made) for each in found] if made else found


def open_local(path: Path, label: str) -> Checkpoint:
    """Open a folder or a single file of weights.

    raises: MissingInput where there are no weights, MalformedFile where they are damaged
    """
    folder = path if path.is_dir() else path.parent
    first = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    index = first if first and first.name in INDEXES else None
    weight_map = read_index(index) if index else {}
    files = [_open_file(file) for file in (_shards(index, weight_map) if index else _weight_files(path))]
    if index:
        check_index(index, weight_map, files)
    if not any(file.tensors for file in files):
        raise MalformedFile(f"{path}: holds no tensor")
    if len(files) == 1 and files[0].path.suffix == ".gguf":
        from wtool.checkpoint.gguf import open_gguf

        return open_gguf(files[0].path, label)
    return Folder(label, path, files, read_config(folder), side_files(folder))


def _open_file(path: Path) -> TensorFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        from wtool.checkpoint.torch_bin import TorchFile

        return TorchFile(path)
    if path.suffix == ".gguf":
        from wtool.checkpoint.gguf import GGUFFile

        return GGUFFile(path)
    raise MalformedFile(f"{path}: not a kind of weights file known here (.safetensors, .bin, .pt, .pth, .gguf)")


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights where no index says so: the file itself, the usual name, else all of a kind."""
    if not path.is_dir():
        return [path]
    for single in SINGLES:
        if (path / single).is_file():
            return [path / single]
    if (path / "adapter_config.json").is_file():
        raise MissingInput(f"{path}: a LoRA adapter, not a model; name its base with it: BASE+{path}")
    for kind in ("*.safetensors", "*.bin", "*.gguf"):
        found = sorted(file for file in path.glob(kind) if file.name != "training_args.bin")
        if kind == "*.gguf" and len(found) > 1:
            raise MissingInput(f"{path}: holds {len(found)} GGUF files; name the one to read, e.g. {found[0]}")
        if found:
            return found
    raise MissingInput(f"{path}: no weights there (looked for model.safetensors, an index, .bin and .gguf files)")


def read_index(index: Path) -> dict[str, str]:
    """An index's map from tensor names to file names, each checked to be a name inside the index's folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise MalformedFile(f"{index}: needs a 'weight_map' from tensor names to file names")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise MalformedFile(f"{index}: names the file '{shard}', which is outside its folder")
    return weight_map


def _shards(index: Path, weight_map: dict[str, str]) -> list[Path]:
    paths = [index.parent / shard for shard in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise MissingInput(f"{index}: names the shard '{path.name}', which is not there (download not finished?)")
    return paths


def check_index(index: Path, weight_map: dict[str, str], files: Sequence[TensorFile]) -> None:
    """Check that an index and the shards it names say the same of every tensor."""
    held = {file.path.name: file.tensors for file in files}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise MissingInput(f"{index}: says tensor '{name}' is in {shard}, which does not hold it")
    for shard, tensors in held.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise MalformedFile(f"{index}: does not name tensor '{name}', which {shard} holds")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise MalformedFile(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise MalformedFile(f"{path}: holds a JSON {type(content).__name__}, not an object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty where there is none."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def side_files(folder: Path) -> dict[str, Path]:
    """The model's files beside weights and config, by name; the code that it brings (`auto_map`) among them."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    configs = [folder / name for name in ("config.json", "tokenizer_config.json")]
    if any("auto_map" in read_json(path) for path in configs if path.is_file()):
        names += sorted(path.name for path in folder.glob("*.py"))
    return {name: folder / name for name in names}
