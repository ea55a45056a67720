"""Which files of a Hub repository are needed: the weights in one format, and what belongs to them."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from wtool.checkpoint.folder import INDEXES, SIDE_FILES, SINGLES, WEIGHTS, read_index
from wtool.errors import MissingInput

CONFIGS = ("config.json", "adapter_config.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


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
    if not weights and not is_adapter(names):
        raise MissingInput(f"{reference}: holds no weights known here (*.safetensors, pytorch_model*.bin, one GGUF)")
    return weights


def is_adapter(names: Collection[str]) -> bool:
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
