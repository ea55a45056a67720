"""How a processor multiplies float32 matrices."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTING = threading.RLock()  # it is the whole process's


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """Have float32 matrices multiplied with their numbers rounded to bfloat16, and the products added in float32.

    Where a processor has units for that it is some times faster; where it has none nothing changes. Of numbers that
    are bfloat16's nothing is lost. Threads that multiply meanwhile must do so in `in_float32`, and wait.
    """
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    with _SETTING:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


@contextmanager
def in_float32() -> Iterator[None]:
    """Have float32 matrices multiplied as they are, in a thread beside one that may be `in_bfloat16`: a little only at
    a time, as that one waits."""
    with _SETTING:
        yield
