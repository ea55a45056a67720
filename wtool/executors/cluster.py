"""The connection to a Ray cluster: quiet, local to the cluster, and with errors in one line."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from wtool.errors import RuntimeProblem, UsageError, WtoolError

RETRIES = 5  # times that work is begun anew because its process or machine is gone


def address_of(executor: str) -> str | None:
    """The address in `ray` or `ray:HOST:PORT`; None where none is given.

    raises: UsageError
    """
    kind, colon, address = executor.partition(":")
    if kind != "ray" or (colon and not address.rpartition(":")[2].isdigit()):
        raise UsageError(f"--executor '{executor}': take local, ray, or ray:HOST:PORT of a cluster's head")
    return address or None


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected for a while.

    address: of the head of a cluster that this machine belongs to; None takes the one that runs here or that
        RAY_ADDRESS names, and else starts one of this machine alone, which ends with this process

    raises: RuntimeProblem
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before it is imported: nothing is told to anybody
    if _has_token():  # with which `ray start` protects a cluster unasked, and a program with an address only if asked
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise RuntimeProblem("Ray is not installed: pip install 'wtool[ray]'") from None
    if address:
        _refuse_silent(address)
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = str(error).strip().partition("\n")[0]
        where = f"the Ray cluster at {address}" if address else "Ray"
        raise RuntimeProblem(f"{where}: cannot be reached: {reason}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _has_token() -> bool:
    """Whether this user has a token for clusters (`ray get-auth-token`)."""
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or Path("~/.ray/auth_token").expanduser().is_file()


def _refuse_silent(address: str) -> None:
    """Ray itself waits for many minutes where nobody listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=20).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise RuntimeProblem(
            f"the Ray cluster at {address}: cannot be reached: {reason}; `ray start --head` tells the address of a head"
        ) from None


def result(ray: Any, reference: Any, what: str) -> Any:
    """What a task gave.

    what: names the task in an error
    raises: WtoolError, the task's own; RuntimeProblem where its processes died again and again
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, WtoolError):
            raise error.cause from None
        raise
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        reason = "was ended for lack of memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else "died"
        raise RuntimeProblem(f"{what}: its process {reason} {RETRIES + 1} times; what is done is kept") from None
