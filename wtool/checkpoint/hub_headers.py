"""A model on the Hub opened by its headers alone: each shard's first kilobytes by range requests, no weights.

So `wtool inspect` and `--dry-run` tell the names, shapes and dtypes of a model of any size in seconds. The headers
are parsed by our own reader, against the file's size as the server tells it, and not by huggingface_hub's, so that a
damaged file is told in the same words far away as here.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from wtool.checkpoint.base import Checkpoint, FileIdentity, TensorFile
from wtool.checkpoint.folder import SIDE_FILES, Folder, check_index, read_index, read_json
from wtool.checkpoint.hub_errors import explained, patiently, progress_bars
from wtool.checkpoint.hub_files import Snapshot, index_name, weight_names
from wtool.checkpoint.safetensors import Header, header_length, parse_header
from wtool.errors import MissingInput, RuntimeProblem

if TYPE_CHECKING:
    import torch

FIRST = 100_000  # bytes; 97 % of the headers on the Hub are shorter, says huggingface_hub, so one request does
CONNECTIONS = 8


class RemoteFile(TensorFile):
    """A safetensors file of which only the header was fetched."""

    def __init__(self, snapshot: Snapshot, name: str, header: Header):
        self.path = Path(snapshot.reference) / name
        self.header = header
        self.tensors = header.tensors

    def read(self, name: str) -> "torch.Tensor":
        raise MissingInput(f"{self.path}: only the header was fetched: tensor '{name}' has no data here")

    def digest(self) -> str:
        return self.header.digest

    def identity(self) -> FileIdentity:
        return FileIdentity(self.path.name, self.header.data_start + self.header.data_size, "0", self.header.digest)


class RemoteFiles(Mapping[str, Path]):
    """The files beside the weights: their names are known, each is downloaded when it is asked for."""

    def __init__(self, snapshot: Snapshot, with_code: bool):
        self._snapshot = snapshot
        code = sorted(name for name in snapshot.names if with_code and name.endswith(".py"))
        self._names = [name for name in SIDE_FILES if name in snapshot.names] + code

    def __getitem__(self, name: str) -> Path:
        if name not in self._names:
            raise KeyError(name)
        return _download(self._snapshot, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_headers(snapshot: Snapshot, make: Callable[[Snapshot, str, Header], RemoteFile] = RemoteFile) -> Checkpoint:
    """Open a repository of safetensors.

    make: the file of a shard, of its name and its header; reading a tensor of a RemoteFile is an error
    raises: MissingInput where it holds none, MalformedFile where a header is damaged
    """
    from huggingface_hub import constants

    reference, names = snapshot.reference, snapshot.names
    index = index_name(names)
    weight_map = read_index(_download(snapshot, index)) if index else {}
    # what is asked of a GGUF is asked of .bin files too
    shards = sorted(set(weight_map.values())) if index else weight_names(names, Path(), reference)
    if not all(shard.endswith(".safetensors") for shard in shards):
        raise MissingInput(
            f"{reference}: has {shards[0]} and no safetensors, and without a download only the headers of those can be"
            f" read: run `hf download {snapshot.repository} --revision {snapshot.commit}`, then this again"
        )
    config = read_json(_download(snapshot, "config.json")) if "config.json" in names else {}
    with explained(reference), ThreadPoolExecutor(CONNECTIONS) as pool:
        files = list(pool.map(lambda shard: make(snapshot, shard, fetch_header(snapshot, shard)), shards))
    if index:
        check_index(Path(reference) / index, weight_map, files)
    checkpoint = Folder(
        reference, Path(constants.HF_HUB_CACHE), files, config, RemoteFiles(snapshot, with_code="auto_map" in config)
    )
    checkpoint.revision = snapshot.commit
    return checkpoint


def fetch_header(snapshot: Snapshot, name: str) -> Header:
    """Fetch and check the header of a safetensors file."""
    where = f"{snapshot.reference}/{name}"
    first, size = fetch_range(snapshot, name, 0, FIRST)
    end = 8 + header_length(first, size, where)
    if end > len(first):
        first += fetch_range(snapshot, name, len(first), end)[0]
    return parse_header(first[8:end], size, where)


def fetch_range(snapshot: Snapshot, name: str, start: int, stop: int) -> tuple[bytes, int]:
    """Fetch a file's bytes from `start` to before `stop`, or to its end, and its whole size."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(snapshot.repository, name, revision=snapshot.commit)
    return patiently(lambda: _range(url, start, stop, f"{snapshot.reference}/{name}"))


def _range(url: str, start: int, stop: int, where: str) -> tuple[bytes, int]:
    """Fetch a file's bytes from `start` to before `stop`, or to its end, and its whole size."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    # streamed: a server that does not know ranges sends the whole file, of which no more is taken than is needed
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code == 416:  # so says a server of an empty file
            return b"", 0
        hf_raise_for_status(response)
        partial = response.status_code == 206
        size = response.headers.get("Content-Range" if partial else "Content-Length", "").rpartition("/")[2]
        if not size.isdecimal():
            raise RuntimeProblem(f"{where}: the server does not tell the file's size")
        skip = 0 if partial else start
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skip + stop - start:
                break
        return bytes(data[skip : skip + stop - start]), int(size)


def _download(snapshot: Snapshot, name: str) -> Path:
    """Download one small file."""
    from huggingface_hub import hf_hub_download

    with explained(snapshot.reference), progress_bars(shown=False):  # of some kilobytes would only flash by
        return Path(hf_hub_download(snapshot.repository, name, revision=snapshot.commit))
