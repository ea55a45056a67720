"""How a processor multiplies float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """Have float32 matrices multiplied with their numbers rounded to bfloat16, and the products added in float32.

    Where a processor has units for that it is some times faster; where it has none nothing changes. The setting is the
    whole process's, so no other thread should multiply meanwhile.
    """
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
