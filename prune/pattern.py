"""How much of a matrix to drop: a share of its weights, or all but N of every M neighbours in a row.

Everywhere here "N:M" is N kept of every M, as hardware makers say it; the code of Wanda and of SparseGPT counts the
zeros instead, which is the same for 2:4 and 4:8 and not for 1:4.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite

from wtool.errors import UsageError


@dataclass(frozen=True)
class Sparsity:
    """What is to be dropped; one of the two.

    share:   of the weights, in [0, 1)
    pattern: (kept, of): so many stay of so many consecutive columns of a row; what is left over at the end of a row,
             fewer columns than `of`, stays dense

    raises: UsageError where they make no sense
    """

    share: float | None = None
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.pattern is None):
            raise UsageError("sparsity: give a share or an N:M pattern, one of the two")
        if self.share is not None and not (isfinite(self.share) and 0 <= self.share < 1):
            raise UsageError(f"sparsity {self.share:g} is not a share of the weights to drop, from 0 to below 1")
        if self.pattern is not None and not 1 <= self.pattern[0] < self.pattern[1]:
            kept, of = self.pattern
            raise UsageError(f"pattern {kept}:{of} is not N kept of every M, with N from 1 to M - 1, such as 2:4")

    def __str__(self) -> str:
        if self.pattern is None:
            return f"{100 * (self.share or 0):.4g} % dropped"
        kept, of = self.pattern
        return f"{kept}:{of} ({kept} kept of every {of} neighbours)"

    @property
    def nominal(self) -> float:
        """The share of the weights that is dropped, but for what rounding and dense tails leave."""
        return 1 - self.pattern[0] / self.pattern[1] if self.pattern else self.share or 0.0

    def dropped(self, rows: int, columns: int, *, by_row: bool) -> int:
        """How many weights of a matrix are dropped, exactly.

        by_row: as many of every row; otherwise of the whole matrix
        """
        if self.pattern is not None:
            kept, of = self.pattern
            return rows * (columns // of) * (of - kept)
        share = self.share or 0.0
        return rows * count(share, columns) if by_row else count(share, rows * columns)


def parse_pattern(text: str) -> Sparsity:
    """Read "N:M", N kept of every M.

    raises: UsageError
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if found is None:
        raise UsageError(f"pattern '{text}' is not N:M, N kept of every M neighbours, such as 2:4")
    return Sparsity(pattern=(int(found[1]), int(found[2])))


def count(share: float, total: int) -> int:
    """The whole number at or below share * total, of the share as it is written: 0.29 of 100 is 29."""
    return int(Fraction(str(float(share))) * total)


def dense_tail(columns: int, sparsity: Sparsity) -> int:
    """How many columns at the end of every row stay dense because they are fewer than the pattern's M."""
    return columns % sparsity.pattern[1] if sparsity.pattern else 0
