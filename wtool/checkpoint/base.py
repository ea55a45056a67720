"""The noun of every input: a checkpoint is a mapping from tensor names to tensors that are read when asked for.

A `Checkpoint` is what the rest of the tool sees; a `TensorFile` is one file of one. Opening either reads
headers only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.dtypes import TensorInfo as TensorInfo
from wtool.errors import MissingInput, did_you_mean

if TYPE_CHECKING:
    import torch


class TensorFile(ABC):
    """One file with tensors in it."""

    path: Path
    tensors: Mapping[str, TensorInfo]  # in the order of their data

    @abstractmethod
    def read(self, name: str) -> "torch.Tensor":
        """The tensor; it may be a view of the mapped file, so it must not be written to."""

    @abstractmethod
    def digest(self) -> str:
        """Tells this file's header from another's, without reading the tensors' data."""

    def identity(self) -> "FileIdentity":
        stat = self.path.stat()
        return FileIdentity(self.path.name, stat.st_size, str(stat.st_mtime_ns), self.digest())

    def prefetch(self, name: str) -> None:  # noqa: B027 - a hint, which a format may ignore
        """Ask the system to have the tensor's bytes ready soon."""

    def expect(self, names: Iterable[str]) -> None:  # noqa: B027 - a hint, which a format may ignore
        """Tell which tensors will be read and forgotten, in that order, each as often as it is named."""

    def forget(self, name: str) -> None:  # noqa: B027 - a hint, which a format may ignore
        """Tell that the tensor's bytes are not needed any more."""


class LazyFiles(Mapping[str, Path]):
    """Files by name, made or looked up when the first of them is asked for."""

    def __init__(self, find: Callable[[], Mapping[str, Path]]):
        self._find = find

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        return self._find()

    def __getitem__(self, name: str) -> Path:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells an input file from another one of the same name, without reading all of it."""

    name: str
    size: int  # bytes
    version: str  # when it was changed (ns), the digest of the manifest that tells what is in it, or the Hub's commit
    header: str  # digest of the header


class Checkpoint(ABC):
    """A model's weights, read lazily tensor by tensor, with the files that stand beside them."""

    label: str  # as the user wrote it
    tensors: Mapping[str, TensorInfo]  # in the order they lie on disk, shard after shard
    config: dict[str, Any]  # config.json; empty where there is none
    files: Mapping[str, Path]  # the other files of the model (tokenizer, generation config, chat template, card)
    revision: str | None = None  # the Hub commit the files are from; None for local files
    quantization: str | None = None  # how the weights lie on disk, where `read` makes plain ones of packed ones

    @abstractmethod
    def read(self, name: str) -> "torch.Tensor":
        """The tensor, in the dtype the header tells or a more precise one.

        It may be a view of a mapped file, so it must not be written to.

        raises: MissingInput if there is no tensor of that name
        """

    @abstractmethod
    def identity(self) -> list[FileIdentity]:
        """The files the weights come from."""

    @abstractmethod
    def folders(self) -> list[Path]:
        """Where the weights lie on this machine (resolved folders or files); nothing may be written there."""

    def prefetch(self, name: str) -> None:  # noqa: B027 - a hint, which a source may ignore
        """Ask the system to have the tensor's bytes ready soon."""

    def expect(self, names: Iterable[str]) -> None:  # noqa: B027 - a hint, which a source may ignore
        """Tell which tensors will be read and forgotten, in that order, each as often as it is named."""

    def forget(self, name: str) -> None:  # noqa: B027 - a hint, which a source may ignore
        """Tell that the tensor's bytes are not needed any more."""

    @cached_property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def parameters(self) -> int:
        return sum(info.elements for info in self.tensors.values())

    def missing(self, name: str) -> MissingInput:
        """The error for a name that is not there."""
        return MissingInput(f"{self.label}: no tensor '{name}'{did_you_mean(name, self.tensors)}")


class View(Checkpoint):
    """A checkpoint whose tensors are made of another's."""

    def __init__(self, source: Checkpoint):
        self.source = source
        self.label, self.revision, self.quantization = source.label, source.revision, source.quantization
        self.files, self.config, self.tensors = source.files, source.config, source.tensors

    @abstractmethod
    def parts(self, name: str) -> Iterable[str]:
        """The source's tensors that one is made of."""

    def identity(self) -> list[FileIdentity]:
        return self.source.identity()

    def folders(self) -> list[Path]:
        return self.source.folders()

    def prefetch(self, name: str) -> None:
        for part in self.parts(name):
            self.source.prefetch(part)

    def expect(self, names: Iterable[str]) -> None:
        self.source.expect([part for name in names for part in self.parts(name)])

    def forget(self, name: str) -> None:
        for part in self.parts(name):
            self.source.forget(part)
