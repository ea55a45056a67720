"""A model of the Hub that passes through this machine shard by shard: fetched ahead of the work, deleted behind it.

The shards do not go into the shared cache but into a folder of the work's own, so that whatever lies there may be
deleted, also what a stopped run left; files that are in the cache already are read there and stay. At most AHEAD shards
of a model are on the disk at a time, the one in use and the next, except where the steps need more of them at once: a
merge of models whose shards are cut in unlike places holds the pieces that overlap.
"""

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from wtool.checkpoint.base import Checkpoint
from wtool.checkpoint.hub_errors import explained, patiently, progress_bars
from wtool.checkpoint.hub_files import Snapshot
from wtool.checkpoint.hub_headers import RemoteFile, fetch_range, open_headers
from wtool.checkpoint.safetensors import Header, SafetensorsFile
from wtool.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

AHEAD = 2  # shards of a model on the disk at a time


def open_streamed(snapshot: Snapshot, place: Path) -> Checkpoint:
    """Open a repository of safetensors whose shards come when they are read.

    place: the folder to keep them in meanwhile; nothing else may be in it
    raises: MissingInput where it holds no safetensors, MalformedFile where a header is damaged
    """
    shards = Shards(snapshot, place / snapshot.repository.replace("/", "--") / snapshot.commit)

    def streamed(snapshot: Snapshot, name: str, header: Header) -> RemoteFile:
        return StreamedFile(snapshot, name, header, shards)

    return open_headers(snapshot, streamed)


class Shards:
    """The shards of a model that are on the disk, and those that are on their way."""

    def __init__(self, snapshot: Snapshot, place: Path):
        self.snapshot = snapshot
        self.place = place.resolve()
        self._left: dict[str, int] = {}  # shard -> reads to come, in the order of the first
        self._coming: dict[str, Future[Path]] = {}
        self._guard = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="download")

    def expect(self, name: str) -> None:
        """Tell of a read to come."""
        with self._guard:
            self._left[name] = self._left.get(name, 0) + 1

    def is_expected(self, name: str) -> bool:
        return bool(self._left.get(name))

    def get(self, name: str) -> Path:
        """The shard's file, once it is there. raises: WtoolError"""
        with self._guard:
            coming = self._start(name)
            self._go_ahead()
        return coming.result()

    def done(self, name: str) -> bool:
        """Tell that a read is over; returns whether it was the last, and the shard is gone."""
        with self._guard:
            self._left[name] -= 1
            if self._left[name]:
                return False
            path = self._coming.pop(name).result()
            if path.resolve().is_relative_to(self.place):
                path.unlink(missing_ok=True)
                log.debug("%s: done with %s, deleted", self.snapshot.reference, name)
            self._go_ahead()
            return True

    def _start(self, name: str) -> "Future[Path]":
        if name not in self._coming:
            self._coming[name] = self._pool.submit(self._fetch, name)
        return self._coming[name]

    def _go_ahead(self) -> None:
        """Begin with the next shards, as many as there is to be room for."""
        for name, left in self._left.items():
            if len(self._coming) >= AHEAD:
                return
            if left:
                self._start(name)

    def _fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        repository, commit = self.snapshot.repository, self.snapshot.commit
        cached = try_to_load_from_cache(repository, name, revision=commit)
        if isinstance(cached, str):
            return Path(cached)
        log.debug("%s: downloading %s", self.snapshot.reference, name)
        with explained(self.snapshot.reference), progress_bars(shown=False):
            found = patiently(lambda: hf_hub_download(repository, name, revision=commit, local_dir=self.place))
        return Path(found)


class StreamedFile(RemoteFile):
    """A shard that is on the disk from before its first read to after its last."""

    def __init__(self, snapshot: Snapshot, name: str, header: Header, shards: Shards):
        super().__init__(snapshot, name, header)
        self._snapshot = snapshot
        self._shards = shards
        self._file: SafetensorsFile | None = None
        self._guard = threading.Lock()

    def expect(self, names: Iterable[str]) -> None:
        for _ in names:
            self._shards.expect(self.path.name)

    def read(self, name: str) -> "torch.Tensor":
        if not self._shards.is_expected(self.path.name):
            return self._fetched_alone(name)
        path = self._shards.get(self.path.name)
        with self._guard:
            self._file = self._file or SafetensorsFile(path)
            return self._file.read(name)

    def forget(self, name: str) -> None:
        if self._shards.is_expected(self.path.name):
            with self._guard:
                if self._file is not None:
                    self._file.forget(name)
                if self._shards.done(self.path.name):
                    self._file = None

    def _fetched_alone(self, name: str) -> "torch.Tensor":
        """A tensor that is looked at before the work begins, by a request for its bytes."""
        import torch

        info = self.tensors[name]
        dtype = torch_dtype(info.dtype)
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        start = self.header.data_start + self.header.offsets[name]
        data = bytearray(fetch_range(self._snapshot, self.path.name, start, start + info.nbytes)[0])
        return torch.frombuffer(data, dtype=dtype).view(info.shape)
