"""Checkpoints on the Hub: `org/name` or `org/name@revision`, downloaded into the cache all Hugging Face tools share.

Of a repository only what is needed comes: the weights in one format (safetensors, else torch .bin, else the one
GGUF), config, tokenizer, the model's own code. The small files come first, so a cached folder that has all weights
has everything. A file that was downloaded whole is never fetched again; where there is no connection, a commit that
is whole in the cache does. Endpoint, token, cache and offline mode are set as for every Hugging Face tool: HF_ENDPOINT,
HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

import logging
import re
import sys
from collections.abc import Collection
from glob import escape
from pathlib import Path

from wtool.checkpoint.base import Checkpoint
from wtool.checkpoint.folder import open_local
from wtool.checkpoint.hub_errors import explained, is_unreachable, patiently
from wtool.checkpoint.hub_files import Snapshot, is_adapter, small_names, weight_names
from wtool.checkpoint.hub_headers import open_headers
from wtool.errors import MissingInput, RuntimeProblem

log = logging.getLogger(__name__)

ONE_OF_MANY = re.compile(r"-\d+-of-(\d+)\.")


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
    return open_headers(snapshot)


def open_streamed(reference: str, place: Path) -> Checkpoint:
    """Open a model whose shards come when they are read and go when that is done, unless it is in the cache already.

    place: the folder to keep them in meanwhile
    """
    snapshot = look_up(reference)
    _refuse_adapter(snapshot)
    if snapshot.folder:
        return _open(snapshot.folder, reference)
    from wtool.checkpoint import hub_stream

    return hub_stream.open_streamed(snapshot, place)


def look_up(reference: str) -> Snapshot:
    """Ask the Hub for the commit and its files; where it cannot be reached, the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    repository, _, revision = reference.partition("@")
    _quiet_unless_watched()
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
        log.debug("%s: commit %s%s", reference, info.sha, ", whole in the cache" if whole else "")
        return Snapshot(reference, info.sha, names, folder if whole else None)


def _quiet_unless_watched() -> None:
    """No progress bars where nobody looks, unless the user's environment says something of them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()


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
    if is_adapter(snapshot.names):
        reference = snapshot.reference
        raise MissingInput(f"{reference}: a LoRA adapter, not a model; name its base with it: BASE+{reference}")


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
