"""What tells a checkpoint that wtool made from any other: its manifest, which has a checksum of every tensor."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "wtool.json"


def made_as(folder: Path, files: Iterable[Path]) -> str | None:
    """The digest of a folder's manifest, where that tells what is in the files beside it.

    So the same work gives the same identity wherever and whenever it is done; of other files only size, header and
    time of change are known.

    files:   that the manifest must not be older than
    returns: None where there is no manifest, it has no checksums, or a file was changed after it was written
    """
    manifest = folder / MANIFEST
    try:
        content = manifest.read_bytes()
        if not json.loads(content).get("tensors_xxh3"):
            return None
        written = manifest.stat().st_mtime_ns
        if any(path.stat().st_mtime_ns > written for path in files if path.suffix in (".safetensors", ".gguf")):
            return None
    except (OSError, ValueError, AttributeError):
        return None
    return hashlib.sha256(content).hexdigest()
