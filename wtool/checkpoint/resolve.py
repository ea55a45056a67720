"""From what a user writes to a checkpoint: `path`, `org/name`, `org/name@revision`, each with `+adapter`s."""

import re
from pathlib import Path

from wtool.checkpoint.base import Checkpoint
from wtool.checkpoint.folder import open_local
from wtool.errors import MissingInput, UsageError, did_you_mean

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def open_checkpoint(reference: str, *, headers_only: bool = False, low_disk: Path | None = None) -> Checkpoint:
    """Open a checkpoint by the name a user gives it.

    reference: a folder, a weights file, a Hub id with an optional @revision; `+adapter` adds a LoRA adapter
    headers_only: for a Hub id, fetch headers by range requests and no weights; reading a tensor is then an error
    low_disk: for a Hub id, a folder to keep each shard in while it is read, instead of the cache
    raises: InputError, UsageError
    """
    base, *adapters = _split(reference)
    if not base:
        raise UsageError(f"'{reference}': no checkpoint is named")
    checkpoint = _decoded(_open_stored(base, headers_only, low_disk))
    for adapter in adapters:
        from wtool.checkpoint.adapter import Adapted

        checkpoint = Adapted(checkpoint, local_folder(adapter), f"{checkpoint.label}+{adapter}")
    return checkpoint


def _open_stored(reference: str, headers_only: bool, low_disk: Path | None) -> Checkpoint:
    path = Path(reference).expanduser()
    if path.exists():
        return open_local(path, reference)
    if not is_hub_id(reference):
        raise _no_such_path(reference, path)
    from wtool.checkpoint import hub

    if headers_only:
        return hub.open_remote(reference)
    if low_disk is not None:
        return hub.open_streamed(reference, low_disk)
    return hub.open_downloaded(reference)


def _decoded(checkpoint: Checkpoint) -> Checkpoint:
    from wtool.checkpoint.float8 import has_float8
    from wtool.checkpoint.quantized import SETTINGS, decoded

    if all(checkpoint.config.get(key) is None for key in SETTINGS) and not has_float8(checkpoint):
        return checkpoint
    return decoded(checkpoint)


def local_folder(reference: str) -> Path:
    """The folder of an adapter, downloaded if it is on the Hub."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not is_hub_id(reference):
        raise _no_such_path(reference, path)
    from wtool.checkpoint import hub

    return hub.download(reference)


def is_hub_id(reference: str) -> bool:
    """Whether a reference has the form of a Hub id: org/name, with an optional @revision."""
    return bool(HUB_ID.fullmatch(reference))


def _split(reference: str) -> list[str]:
    """Split at the `+`s that join adapters, not at those that are part of a path that exists."""
    parts: list[str] = []
    rest = reference.split("+")
    while rest:
        whole = next((n for n in range(len(rest), 0, -1) if Path("+".join(rest[:n])).expanduser().exists()), 1)
        parts.append("+".join(rest[:whole]))
        rest = rest[whole:]
    return parts


def _no_such_path(reference: str, path: Path) -> MissingInput:
    parent = path.parent
    neighbours = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return MissingInput(f"{reference}: no such file or folder{did_you_mean(path.name, neighbours)}")
