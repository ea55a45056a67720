"""Checkpoints on the Hub: `org/name` or `org/name@revision`, downloaded into the cache all Hugging Face tools share.

Of a repository only what is needed comes: the weights in one format (safetensors, else torch .bin, else the one
GGUF), config, tokenizer, the model's own code. The small files come first, so a cached folder that has all weights
has everything. A file that was downloaded whole is never fetched again; where there is no connection, a commit that
is whole in the cache does. Endpoint, token, cache and offline mode are set as for every Hugging Face tool: HF_ENDPOINT,
HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from wtool.checkpoint.base import Checkpoint
from wtool.checkpoint.folder import INDEXES, SIDE_FILES, SINGLES, WEIGHTS, open_local, read_index
from wtool.checkpoint.hub_errors import explained, is_unreachable, patiently
from wtool.errors import MissingInput, RuntimeProblem

log = logging.getLogger(__name__)

CONFIGS = ("config.json", "adapter_config.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
ONE_OF_MANY = re.compile(r"-\d+-of-(\d+)\.")


@dataclass(frozen=True)
class Snapshot:
    """A repository of the Hub at one commit."""

    reference: str  # as the user wrote it
    commit: str
    names: frozenset[str]  # the files at its top level
    folder: Path | None  # where all that is needed of it lies on this machine; None if not all is here

    @property
    def repository(self) -> str:
        return self.reference.partition("@")[0]

    @property
    def revision(self) -> str | None:
        return self.reference.partition("@")[2] or None


def download(reference: str) -> Path:
    """Download what is needed of a repository, be it a model or a LoRA adapter.

    returns: the folder, in the shared cache; its name is the commit
    raises: MissingInput, RuntimeProblem where the Hub cannot be reached, DiskFull
    """
    snapshot = look_up(reference)
    return snapshot.folder or _fetch(snapshot)


def open_downloaded(reference: str) -> Checkpoint:
    """Download a model and open it."""
    snapshot = look_up(reference)
    _refuse_adapter(snapshot)
    return _open(snapshot.folder or _fetch(snapshot), reference)


def open_remote(reference: str) -> Checkpoint:
    """Open a model for its headers alone, without its weights unless they are in the cache already."""
    snapshot = look_up(reference)
    _refuse_adapter(snapshot)
    if snapshot.folder:
        return _open(snapshot.folder, reference)
    from wtool.checkpoint.hub_headers import open_headers

    return open_headers(snapshot)


def look_up(reference: str) -> Snapshot:
    """Ask the Hub for the commit and its files; where it cannot be reached, the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    repository, _, revision = reference.partition("@")
    with explained(reference):
        try:
            info = HfApi().model_info(repository, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:
            folder = _cached(repository, revision or None) if is_unreachable(error) else None
            if folder is None or not _is_whole(folder):
                raise
            if not isinstance(error, OfflineModeIsEnabled):
                log.warning("%s: the Hub cannot be reached; using commit %s from the cache", reference, folder.name)
            return Snapshot(reference, folder.name, _names_in(folder), folder)
        if info.sha is None:
            raise RuntimeProblem(f"{reference}: {constants.ENDPOINT} does not tell the commit: is it a Hub?")
        names = frozenset(file.rfilename for file in info.siblings or () if "/" not in file.rfilename)
        folder = _cached(repository, info.sha)
        whole = folder is not None and not _missing(names, folder, reference)
        return Snapshot(reference, info.sha, names, folder if whole else None)


def _fetch(snapshot: Snapshot) -> Path:
    from huggingface_hub import snapshot_download

    def get(names: list[str], revision: str | None) -> Path:
        wanted = [escape(name) for name in names]
        return Path(patiently(lambda: snapshot_download(snapshot.repository, revision=revision, allow_patterns=wanted)))

    reference = snapshot.reference
    with explained(reference):
        # by the revision's name, so that the cache remembers it for the days without a connection
        folder = get(small_names(snapshot.names), snapshot.revision)
        if folder.name != snapshot.commit:  # somebody has pushed since we looked
            return download(reference)
        weights = weight_names(snapshot.names, folder, reference)
        if weights:
            get(weights, snapshot.commit)
        missing = _missing(snapshot.names, folder, reference)
        if missing:
            raise RuntimeProblem(f"{reference}: the download ended without {missing[0]}: run it again")
    return folder


def _open(folder: Path, reference: str) -> Checkpoint:
    checkpoint = open_local(folder, reference)
    checkpoint.revision = folder.name
    return checkpoint


def _refuse_adapter(snapshot: Snapshot) -> None:
    if _is_adapter(snapshot.names):
        reference = snapshot.reference
        raise MissingInput(f"{reference}: a LoRA adapter, not a model; name its base with it: BASE+{reference}")


def small_names(names: Collection[str]) -> list[str]:
    """Of the files of a repository, those that are needed beside the model's weights; a LoRA adapter is small too."""
    adapter = next((name for name in ADAPTERS if name in names), None)
    wanted = {*SIDE_FILES, *CONFIGS, index_name(names), adapter}
    return sorted(name for name in names if name in wanted or name.endswith(".py"))


def index_name(names: Collection[str]) -> str | None:
    """The index that says which shards hold the weights, in the order of preference of `folder.WEIGHTS`."""
    first = next((name for name in WEIGHTS if name in names), None)
    return first if first in INDEXES and (first == INDEXES[0] or not _safetensors(names)) else None


def weight_names(names: Collection[str], folder: Path, reference: str) -> list[str]:
    """Of the files of a repository, those that hold the model's weights, in the first format there is.

    folder: where the index is, if the repository has one
    returns: nothing for an adapter
    raises: MissingInput where there are no weights, or too many to choose from
    """
    index = index_name(names)
    if index:
        shards = sorted(set(read_index(folder / index).values()))
        for shard in shards:
            if shard not in names:
                raise MissingInput(f"{reference}: {index} names the shard '{shard}', which is not in the repository")
        return shards
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    weights = _safetensors(names) or _bins(names) or ggufs
    if weights == ggufs and len(ggufs) > 1:
        repository = reference.partition("@")[0]
        raise MissingInput(
            f"{reference}: holds {len(ggufs)} GGUF files and no other weights: download one, e.g."
            f" `hf download {repository} {ggufs[0]}`, and name that file instead"
        )
    if not weights and not _is_adapter(names):
        raise MissingInput(f"{reference}: holds no weights known here (*.safetensors, pytorch_model*.bin, one GGUF)")
    return weights


def _is_adapter(names: Collection[str]) -> bool:
    """Whether a repository holds a LoRA adapter and no model."""
    adapter = "adapter_config.json" in names and any(name in names for name in ADAPTERS)
    return adapter and not _safetensors(names) and not _bins(names)


def _safetensors(names: Collection[str]) -> list[str]:
    if SINGLES[0] in names:
        return [SINGLES[0]]
    # consolidated.*: the same weights once more, in the names of the maker's own code
    other = (*ADAPTERS, "consolidated")
    return sorted(name for name in names if name.endswith(".safetensors") and not name.startswith(other))


def _bins(names: Collection[str]) -> list[str]:
    if SINGLES[1] in names:
        return [SINGLES[1]]
    return sorted(name for name in names if name.startswith("pytorch_model") and name.endswith(".bin"))


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision in the local cache, perhaps with part of its files only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir())


def _missing(names: Collection[str], folder: Path, reference: str) -> list[str]:
    """What is needed of a repository's files and is not in the folder."""
    missing = [name for name in small_names(names) if not (folder / name).is_file()]
    if missing:  # the index may be among them, and without it the shards are not known
        return missing
    return [name for name in weight_names(names, folder, reference) if not (folder / name).is_file()]


def _is_whole(folder: Path) -> bool:
    """Whether a cached folder holds a model's or an adapter's weights, as far as can be told without the Hub."""
    names = _names_in(folder)
    try:
        missing = _missing(names, folder, str(folder))
        weights = [] if missing else weight_names(names, folder, str(folder))
    except MissingInput:
        return False
    parts = [match for name in weights if (match := ONE_OF_MANY.search(name))]
    return not missing and all(len(parts) == int(match[1]) for match in parts)
