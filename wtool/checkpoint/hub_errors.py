"""What huggingface_hub and the network raise, said in one line to the person who must act.

The HTTP library under huggingface_hub is httpx in its versions 1.x and httpx2 in 2.x, so errors of the connection
are told by the names of their classes.
"""

import errno
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from wtool.errors import DiskFull, MissingInput, OutputError, RuntimeProblem, UsageError, WtoolError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

NOT_NOW = (408, 425, 429, 500, 502, 503, 504)  # HTTP status codes that another try may not meet
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
TRIES = 3

T = TypeVar("T")


@contextmanager
def explained(reference: str) -> Iterator[None]:
    """Turn the errors of talking to the Hub into ours.

    reference: what the user wrote, `org/name` or `org/name@revision`
    raises: MissingInput, RuntimeProblem, OutputError or UsageError; bugs pass as they are
    """
    try:
        yield
    except WtoolError:
        raise
    except Exception as error:
        problem = _explain(error, reference)
        if problem is None:
            raise
        raise problem from error


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Whether huggingface_hub shows its own for a while; what the user's environment says of them stands."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def is_unreachable(error: Exception) -> bool:
    """Whether the Hub could not be asked at all: offline, no connection, or it is down."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return is_unreachable(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in NOT_NOW
    return isinstance(error, (OfflineModeIsEnabled, json.JSONDecodeError)) or _is_connection(error)


def patiently(work: Callable[[], T]) -> T:
    """Do something over the network; where the connection is lost on the way, again, a few times in all."""
    for attempt in range(1, TRIES):
        try:
            return work()
        except Exception as error:
            if not is_unreachable(error):
                raise
            time.sleep(attempt)
    return work()


def _is_connection(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or not names.isdisjoint({"RequestError", "InvalidURL"})


def _explain(error: Exception, reference: str) -> WtoolError | None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HFValidationError):
        return UsageError(f"{reference}: neither a file or folder here nor a Hub id: {_line(error)}")
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _explain(error.__cause__, reference)
    if isinstance(error, HfHubHTTPError):
        return _answered(error, reference)
    if isinstance(error, OfflineModeIsEnabled):
        return MissingInput(
            f"{reference}: not complete in the local cache ({_cache()}), and HF_HUB_OFFLINE forbids to download it:"
            " unset HF_HUB_OFFLINE, or download it beforehand"
        )
    if isinstance(error, json.JSONDecodeError):
        return RuntimeProblem(
            f"{reference}: {_hub()} does not answer as the Hub does (no JSON): check HF_ENDPOINT and the proxy"
        )
    if _is_connection(error):
        return RuntimeProblem(
            f"{reference}: no connection to the Hub at {_hub()} ({_line(error)}), and not complete in the local cache"
            f" ({_cache()}): check the network, the proxy and HF_ENDPOINT, then run it again (finished files are kept)"
        )
    return _while_writing(error, reference)


def _answered(error: "HfHubHTTPError", reference: str) -> WtoolError:
    """The Hub answered with an HTTP error."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = reference.partition("@")
    status = error.response.status_code
    said = " ".join((error.server_message or error.response.reason_phrase).split())
    token = "the token in use may not read it" if get_token() else "set HF_TOKEN to a token that may read it"
    if isinstance(error, GatedRepoError):
        return MissingInput(f"{reference}: a gated repository: ask for access at {_hub()}/{name}; {token}")
    if isinstance(error, RepositoryNotFoundError):
        return MissingInput(
            f"{reference}: no such file or folder here, and no such repository on the Hub ({_hub()}):"
            f" check the spelling; if it is private, {token}"
        )
    if isinstance(error, RevisionNotFoundError):
        return MissingInput(
            f"{reference}: the repository has no revision '{revision or 'main'}':"
            " a branch, a tag or a whole commit hash is wanted"
        )
    if isinstance(error, EntryNotFoundError):
        return MissingInput(f"{reference}: the Hub lists a file that it does not have: {error.response.url.path}")
    if status == 401:
        return MissingInput(f"{reference}: the Hub refuses the token (401: {said}): renew HF_TOKEN, or unset it")
    if status == 403:
        return MissingInput(f"{reference}: the Hub refuses access (403: {said}): check what the token may read")
    if status == 429:
        return RuntimeProblem(
            f"{reference}: the Hub asks for fewer requests (429): wait some minutes and run it again"
            f"{'' if get_token() else '; with HF_TOKEN set the limit is higher'}"
        )
    return RuntimeProblem(f"{reference}: the Hub at {_hub()} answered {status} ({said}): run it again later")


def _while_writing(error: Exception, reference: str) -> WtoolError | None:
    """The files came, but could not be kept; hf_xet (Rust) tells such things in RuntimeErrors."""
    number = getattr(error, "errno", None)
    if number in NO_ROOM or (isinstance(error, RuntimeError) and "os error 28" in str(error)):
        return DiskFull(
            f"{reference}: no room left for the download in {_cache()}: free some, or set HF_HOME to a larger disk,"
            " then run it again (finished files are kept)"
        )
    if isinstance(error, OSError) and number:
        place = error.filename or _cache()
        return OutputError(f"{reference}: the download cannot be kept in {place}: {error.strerror}")
    if isinstance(error, OSError) or type(error) is RuntimeError:
        return RuntimeProblem(f"{reference}: the download failed: {_line(error)}")
    return None


def _line(error: Exception) -> str:
    """An error's first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _hub() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
