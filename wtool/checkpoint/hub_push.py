"""A folder on its way to the Hub: which of its files go, and the upload.

huggingface_hub's `upload_folder` does the work: files that are there already are not sent again, and large ones go in
parts that an interrupted upload does not send twice.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wtool.checkpoint.folder import INDEXES, SIDE_FILES
from wtool.checkpoint.hub_errors import explained, is_unreachable
from wtool.checkpoint.made import MANIFEST
from wtool.errors import OutputError, RuntimeProblem, WtoolError

WEIGHTS = (".safetensors", ".bin", ".gguf")
BESIDE = {*SIDE_FILES, *INDEXES, MANIFEST, "config.json", "adapter_config.json", "LICENSE", "NOTICE", "USE_POLICY.md"}
CARD = "README.md"


@dataclass(frozen=True)
class Contents:
    """The files of a folder, sorted out."""

    files: Mapping[str, int]  # what goes: name -> bytes
    left: Sequence[str]  # what does not: files that belong to no checkpoint, and folders


@dataclass(frozen=True)
class Pushed:
    """How an upload ended."""

    url: str
    commit: str
    private: bool
    deleted: Sequence[str]  # weights of before that the new ones replace


def contents(folder: Path) -> Contents:
    """Which of a folder's files make up the checkpoint; hidden ones are passed over."""
    files: dict[str, int] = {}
    left: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        known = path.name in BESIDE or path.suffix in (*WEIGHTS, ".py") or path.suffix == ".jinja"
        if path.is_file() and known and path.name != "training_args.bin":
            files[path.name] = path.stat().st_size
        else:
            left.append(path.name)
    return Contents(files, left)


def upload(
    folder: Path, files: Sequence[str], card: str, repository: str, *, branch: str | None, public: bool, message: str
) -> Pushed:
    """Upload files of a folder and a card to a repository, which is made where it is not there.

    branch: made where it is not there; None is main
    public: a new repository is for everybody to see
    raises: OutputError where the Hub refuses, RuntimeProblem where it cannot be reached
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise OutputError(f"{repository}: no token for the Hub: set HF_TOKEN to one that may write, or `hf auth login`")
    api = HfApi()
    with refused(repository), _staged(folder, files, card) as staging:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        private = bool(api.model_info(repository).private)
        if not private and not public:
            raise OutputError(f"{repository}: is there already and public; --public pushes for everybody to see")
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        stale = stale_weights(api.list_repo_files(repository, revision=branch), files)
        done = api.upload_folder(
            repo_id=repository, folder_path=staging, revision=branch, commit_message=message, delete_patterns=stale
        )
    return Pushed(str(url), done.oid, private, stale)


def stale_weights(there: Sequence[str], files: Sequence[str]) -> list[str]:
    """Weights in a repository that would stand beside the new ones and be loaded with them, or in their place.

    GGUF files stay: a repository may hold many.
    """
    if not any(name.endswith(".safetensors") for name in files):
        return []
    mine = {*INDEXES, *(name for name in there if name.endswith(WEIGHTS[:2]) and "/" not in name)}
    return sorted(name for name in there if name in mine and name not in files)


@contextmanager
def _staged(folder: Path, files: Sequence[str], card: str) -> Iterator[Path]:
    """A folder with links to the files and the card; the folder itself is not changed."""
    with tempfile.TemporaryDirectory(prefix="wtool-push-") as place:
        for name in files:
            if name != CARD:
                os.symlink((folder / name).resolve(), Path(place) / name)
        (Path(place) / CARD).write_text(card, encoding="utf-8")
        yield Path(place)


@contextmanager
def refused(repository: str) -> Iterator[None]:
    """Turn the errors of writing to the Hub into ours.

    raises: OutputError, RuntimeProblem; bugs pass as they are
    """
    with explained(repository):
        try:
            yield
        except WtoolError:
            raise
        except Exception as error:
            problem = _explain(error, repository)
            if problem is None:
                raise
            raise problem from error


def _explain(error: Exception, repository: str) -> WtoolError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of one file of several
        return _explain(error.__cause__, repository) or RuntimeProblem(f"{repository}: the upload failed: {error}")
    if isinstance(error, ValueError) and "README.md" in str(error) and not isinstance(error, json.JSONDecodeError):
        return OutputError(f"{repository}: the Hub does not take the card: {' '.join(str(error).split())}")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 402, 403, 404, 409, 413):
        return _answered(error.response.status_code, error, repository)
    if is_unreachable(error):
        return RuntimeProblem(
            f"{repository}: the Hub at {constants.ENDPOINT} cannot be reached or is out of order"
            f" ({(str(error).splitlines() or [type(error).__name__])[0]}): run it again, what was sent is kept there"
        )
    return None


def _answered(status: int, error: Exception, repository: str) -> OutputError:
    owner = repository.partition("/")[0]
    told = getattr(error, "server_message", None) or str(error)
    said = f"{status}: {' '.join(told.split())}"
    cures = {
        401: "renew HF_TOKEN; it must be a token that may write",
        403: f"the token in use may not write there: it needs the right to write to '{owner}'",
        404: f"no such repository or branch, or the token may not see it: check the name and the rights for '{owner}'",
        409: "the name is taken, or something else is being written there: choose another name, or run it again",
    }
    return OutputError(f"{repository}: the Hub refuses the upload ({said}): {cures.get(status, 'see what it says')}")
