"""Which of several candidates each matrix takes, so that the sum of their losses is least within a budget of bytes.

A multiple-choice knapsack: with x[i, j] = 1 where group i takes candidate j,

    minimize Σ loss[i, j] x[i, j]   where   Σ_j x[i, j] = 1 for every i,   Σ size[i, j] x[i, j] <= budget,

solved as a mixed-integer program by HiGHS (Huangfu and Hall, "Parallelizing the dual revised simplex method", 2018,
https://doi.org/10.1007/s12532-017-0130-5) through `scipy.optimize.milp`. Its relaxation splits one group at most (Sinha
and Zoltners, "The Multiple-Choice Knapsack Problem", 1979, https://doi.org/10.1287/opre.27.3.503), so that the gap is
closed at once but for the last few bytes; what is left of it is told. No names here, and no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from typing import Any

from wtool.errors import RuntimeProblem

GAP = 1e-4  # of the loss, relative: where the solver may stop
LARGEST = 1e5  # of the figures handed to the solver, whose tolerances are absolute
Candidate = tuple[int, int, float]  # which, its size, its loss


@dataclass(frozen=True)
class Allocation:
    """What each matrix takes."""

    choices: tuple[int, ...]  # the candidate of each matrix
    size: int  # bytes, at most the budget
    loss: float  # the sum over matrices
    bound: float  # no choice within the budget has a smaller sum; at most `loss`

    @property
    def gap(self) -> float:
        """How much smaller a sum is not ruled out, as a share of the loss; 0 is proven best."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def allocate(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], groups: Sequence[Sequence[int]], budget: int
) -> Allocation:
    """Choose a candidate for every matrix.

    sizes:  [matrices][candidates], bytes
    losses: [matrices][candidates], at least 0; infinite where a candidate cannot be
    groups: of matrices that must take the same candidate; each matrix is in one
    budget: bytes, at least `smallest(sizes, losses, groups)`

    raises: RuntimeProblem where scipy is missing
    """
    rows = [_undominated(candidates) for candidates in _together(sizes, losses, groups)]
    base = sum(row[0][1] for row in rows)
    assert all(rows) and base <= budget, "the smallest candidates fit"
    picked, bound = _solved(rows, budget - base)
    choices = [0] * len(sizes)
    for group, row, pick in zip(groups, rows, picked, strict=True):
        for matrix in group:
            choices[matrix] = row[pick][0]
    size = sum(row[pick][1] for row, pick in zip(rows, picked, strict=True))
    loss = sum(row[pick][2] for row, pick in zip(rows, picked, strict=True))
    return Allocation(tuple(choices), size, loss, min(loss, bound))


def smallest(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]) -> int:
    """The least bytes that any choice takes; the arguments are those of `allocate`."""
    return sum(min(size for _, size, _ in candidates) for candidates in _together(sizes, losses, groups))


def _together(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], groups: Sequence[Sequence[int]]
) -> list[list[Candidate]]:
    """The candidates of each group that all its matrices can take, with the sums of their sizes and losses."""
    found: list[list[Candidate]] = []
    for group in groups:
        summed = [
            (j, sum(sizes[i][j] for i in group), float(sum(losses[i][j] for i in group)))
            for j in range(len(sizes[group[0]]))
        ]
        found.append([candidate for candidate in summed if isfinite(candidate[2])])
    return found


def _undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no smaller or equal one is as good as, by size."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (each[1], each[2], each[0])):
        if not kept or candidate[2] < kept[-1][2]:
            kept.append(candidate)
    return kept


def _solved(rows: Sequence[Sequence[Candidate]], spare: int) -> tuple[list[int], float]:
    """The place of the pick in each row, and the bound of the loss.

    spare: bytes that may be taken beyond the smallest candidates
    """
    if sum(row[-1][1] - row[0][1] for row in rows) <= spare:  # all take their best; what is dominated is gone
        return [len(row) - 1 for row in rows], sum(row[-1][2] for row in rows)
    allowed, first = spare, None
    while True:
        picked, bound = _milp(rows, allowed)
        first = bound if first is None else first
        over = sum(row[pick][1] - row[0][1] for row, pick in zip(rows, picked, strict=True)) - spare
        if over <= 0:
            return picked, first
        allowed = max(0, allowed - over)  # the solver's tolerance let a few bytes through


def _milp(rows: Sequence[Sequence[Candidate]], spare: int) -> tuple[list[int], float]:
    np, optimize, sparse = _solver()
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    extra = np.array([candidate[1] - row[0][1] for row in rows for candidate in row], dtype=float)
    worse = np.array([candidate[2] - row[-1][2] for row in rows for candidate in row])
    of_size, of_loss = LARGEST / max(extra.max(), spare, 1), LARGEST / max(worse.max(), 1e-300)
    one_each = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    answer = optimize.milp(
        worse * of_loss,
        integrality=np.ones(len(owner)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(extra[None] * of_size, -np.inf, spare * of_size),
        ],
        options={"mip_rel_gap": GAP},
    )
    if answer.x is None:
        raise RuntimeProblem(f"the solver found no allocation: {answer.message}")
    begins = np.searchsorted(owner, np.arange(len(rows)))
    picked = [int(part.argmax()) for part in np.split(answer.x, begins[1:])]
    return picked, answer.mip_dual_bound / of_loss + sum(row[-1][2] for row in rows)


def _solver() -> tuple[Any, Any, Any]:
    if find_spec("scipy") is None:
        raise RuntimeProblem("choosing bits by layer needs scipy: pip install 'wtool[allocate]'")
    import numpy
    from scipy import optimize, sparse

    return numpy, optimize, sparse
