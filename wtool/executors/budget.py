"""A bound on the memory of the steps in flight."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from wtool.console import human_bytes
from wtool.errors import UsageError
from wtool.plan import Step


class Budget:
    """Lets a step begin when there is room for it beside those in flight.

    limit: bytes; None is no bound
    """

    def __init__(self, limit: int | None):
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    def check(self, steps: Sequence[Step]) -> None:
        """Refuse what a step alone is too large for.

        raises: UsageError
        """
        largest = max(steps, key=lambda step: step.nbytes_in_flight, default=None)
        if largest and self._limit is not None and largest.nbytes_in_flight > self._limit:
            raise UsageError(
                f"--memory {human_bytes(self._limit)} is too little: '{next(iter(largest.outputs))}' alone takes "
                f"{human_bytes(largest.nbytes_in_flight)}"
            )

    @contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        """Wait until so many bytes fit in, and hold them; what is larger than the bound waits to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._limit is None or not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()
