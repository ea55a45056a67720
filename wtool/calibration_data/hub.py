"""Datasets: `org/name[:configuration][@revision]` on the Hub, a folder, or a parquet or arrow file, by `datasets`.

Rows come in the dataset's own order, and only as many as are needed: of a dataset of terabytes some megabytes are
fetched. Where the Hub cannot be reached, a dataset that lies whole in the cache of `datasets` does.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.calibration_data.rows import Chat, Document, Rows, Text, content, document, find_key
from wtool.errors import InputError, RuntimeProblem, WtoolError
from wtool.writer import checksum

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # file name ending -> what `datasets` calls it
ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<configuration>[\w./-]+))?(@(?P<revision>[\w./-]+))?"
)
PER_TOKEN = 4  # characters, about


def open_dataset(reference: str, *, split: str, column: str | None, characters: int) -> Rows:
    """The first rows of a dataset.

    column: the column that holds the text, where it is none of the known ones
    characters: how much text is enough
    raises: InputError, RuntimeProblem where `datasets` is not installed or the Hub cannot be asked
    """
    kept: list[Document] = []
    size = 0
    with _explained(reference):
        rows, record = _load(reference, split)
        first = next(rows, None)
        if first is None:
            raise InputError(f"{reference}: no text to calibrate on: split '{split}' has no rows")
        key = find_key(first, f"{reference}: row 1", column)
        for number, row in enumerate(chain([first], rows), 1):
            kept.append(document(row, f"{reference}: row {number}", key))
            size += _characters(kept[-1])
            if size >= characters:
                break
    record |= {"split": split, "key": key, "rows": len(kept), "xxh3": checksum(repr([*map(content, kept)]).encode())}
    return Rows(reference, len(kept), kept.__getitem__, record)


def is_dataset(path: Path) -> bool:
    """Whether a path that exists is for `datasets` to read."""
    return path.is_dir() or path.suffix.lower() in BUILDERS


def _load(reference: str, split: str) -> tuple[Iterator[Any], dict[str, Any]]:
    """The rows, and what they are of."""
    path = Path(reference).expanduser()
    if path.is_file():
        builder = BUILDERS[path.suffix.lower()]
        return iter(_rows(builder, data_files=str(path), split=split, streaming=True)), {"file": reference}
    if path.is_dir():
        return iter(_rows(str(path), split=split, streaming=True)), {"folder": reference}
    found = ID.fullmatch(reference)
    assert found, reference
    name, configuration, revision = found["name"], found["configuration"], found["revision"]
    commit = _commit(name, revision, reference)
    rows = _rows(name, configuration, split=split, revision=commit or revision, streaming=commit is not None)
    record = {"dataset": name, "configuration": configuration, "revision": commit or revision}
    return iter(rows), {key: value for key, value in record.items() if value}


def _commit(name: str, revision: str | None, reference: str) -> str | None:
    """The commit of a dataset; None where the Hub cannot be reached.

    raises: MissingInput, RuntimeProblem
    """
    from huggingface_hub import HfApi

    from wtool.checkpoint.hub_errors import explained, is_unreachable

    with explained(reference):
        try:
            return HfApi().dataset_info(name, revision=revision).sha
        except Exception as error:
            if is_unreachable(error):
                return None
            raise


def _rows(*names: Any, **settings: Any) -> "Iterable[Mapping[str, Any]]":
    from datasets import load_dataset

    found: Dataset | IterableDataset = load_dataset(*names, **settings)
    return found  # pyright: ignore[reportReturnType] - rows are dicts


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """Tell in one line what `datasets` tells in many, and let it draw no bars."""
    try:
        import datasets
    except ImportError:
        raise RuntimeProblem(
            f"{reference}: reading datasets needs the datasets package: pip install 'wtool[datasets]'"
        ) from None
    drawn = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    except WtoolError:
        raise
    except ConnectionError:
        raise RuntimeProblem(
            f"{reference}: the Hub cannot be reached, and the cache of the datasets package does not hold it: "
            "check the network and HF_ENDPOINT, or give a text file"
        ) from None
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{reference}: the datasets package cannot read it: {reason}") from error
    finally:
        if drawn:
            datasets.enable_progress_bars()


def _characters(found: Document) -> int:
    if isinstance(found, Text):
        return len(found.text)
    if isinstance(found, Chat):
        return sum(len(str(message.get("content"))) for message in found.messages)
    return PER_TOKEN * len(found.ids)
