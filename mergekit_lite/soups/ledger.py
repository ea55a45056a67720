"""What has been measured already: a small file beside the output, so that a stopped search goes on.

Every measurement stands under a key that tells inputs, recipe, texts and the way of scoring, so what does not fit is
not found. Once the output is there its manifest holds the measurements, and the file is gone.
"""

import json
import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from wtool.errors import OutputExists
from wtool.shards import json_bytes
from wtool.writer import MANIFEST, disk_errors

Nats = list[float | None]  # loss of each text in nats a token; None where it is not finite


class Ledger:
    """Measurements by their keys, kept on disk as they come.

    out:   the output, which may be there
    force: it is to be made anew; what it tells of measurements holds all the same
    """

    def __init__(self, out: Path, *, force: bool = False):
        self.out = out
        self.path = out.parent / f".{out.name}.greedy.json"
        self._closed = out.exists() and not force
        self._kept = {**_of_manifest(out / MANIFEST), **_mapping(_read(self.path))}

    def find(self, key: str) -> list[float] | None:
        """A measurement, None where it has not been made."""
        found = self._kept.get(key)
        return None if found is None else [float("nan") if nats is None else nats for nats in found]

    def require_room(self) -> None:
        """Refuse to measure for an output that is there already and was made of other measurements.

        raises: OutputExists
        """
        if self._closed:
            raise OutputExists(f"{self.out}: there already; --force replaces it")

    def keep(self, key: str, nats: Sequence[float]) -> None:
        """Write a measurement down; it is on the disk when this returns.

        raises: OutputError
        """
        self._kept[key] = finite(nats)
        fresh = self.path.with_name(f"{self.path.name}.new")
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                file.write(json_bytes(self._kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)

    def remove(self) -> None:
        """The output is there, and tells all of it."""
        self.path.unlink(missing_ok=True)


def finite(nats: Sequence[float]) -> Nats:
    """Losses as JSON has them."""
    return [each if isfinite(each) else None for each in nats]


def _of_manifest(path: Path) -> dict[str, Nats]:
    """What the manifest of an output tells of its measurements."""
    record = _mapping(_mapping(_read(path)).get("greedy"))
    return _mapping(record.get("measured"))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
