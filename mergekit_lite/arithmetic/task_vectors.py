"""Task vectors: what fine-tuning added to a base, thinned out, weighed, made to agree, summed, added back.

The common form of task arithmetic, TIES, breadcrumbs, DARE and DELLA. With task vectors d_i = theta_i - theta_0:

    1. thin     d_i <- S_i(d_i)                                  (what these do differently)
    2. weigh    d_i <- w_i d_i
    3. elect    s = +1 where sum_i d_i >= 0, else -1; drop what has another sign than s   (TIES; optional)
    4. sum      d = sum_i d_i, divided, if asked, by the weights of the models that take part in the element
    5. add      out = theta_0 + lambda d
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import torch
from torch import Tensor

from wtool.pieces import Pieces

from . import chunks
from .selection import Cut

ALL = Cut(magnitude=-1.0, ties_end=0)
NONE = Cut(magnitude=inf, ties_end=0)


@dataclass(frozen=True)
class Thin:
    """What is left of a task vector.

    kept:    only these elements
    dropped: and of them not these
    factors: (first element, how many) -> what elements are multiplied by, in the working type, or random bits, uint16
    level:   elements are kept where random bits are less
    unit:    factors are asked for of so many elements, or of several times as many
    times:   and all of them by this
    """

    kept: Cut = ALL
    dropped: Cut = NONE
    factors: Callable[[int, int], chunks.Array] | None = None
    level: int = 0
    unit: int = 1
    times: float = 1.0


NOTHING = Thin(kept=NONE)
WHOLE = Thin()


def merge_task_vectors(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    thin: Sequence[Thin],
    weight: Sequence[float],
    elect: bool,
    normalize: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> Pieces:
    """Merge by the five steps above.

    thin:      one a model
    elect:     drop elements whose sign is not the majority's
    normalize: divide each element by the sum of the weights that went into it
    scale:     lambda
    """
    tensors = [base, *models]
    if elect and normalize and len(set(weight)) == 1 and weight[0] > 0:
        weight = [1.0] * len(weight)  # the mean of equal weights does not depend on them
    if not elect and normalize and abs(total := sum(weight)) >= 1e-8:
        scale /= total
    limits = [_limits(each) for each in thin]
    cuts = chunks.of_working_type(tensors, [magnitudes for magnitudes, _ in limits])
    ends = np.array([places for _, places in limits], dtype=np.int64)
    levels = np.array([each.level for each in thin], dtype=np.int32)
    counts = chunks.of_working_type(tensors, weight)
    times = chunks.of_working_type(tensors, [each.times * w for each, w in zip(thin, weight, strict=True)])
    factor = chunks.of_working_type(tensors, scale)[()]
    work = chunks.work(tensors, len(models) + 4)

    def merge(begin: int, parts: tuple[chunks.Array, ...], out: chunks.Array) -> None:
        factors = _factors(thin, begin, out.size, work.dtype)
        original, *tuned = parts
        thinning = cuts, ends - begin, factors, levels, times
        chunks.kernels().merge(original, tuple(tuned), out, work, *thinning, counts, elect, normalize, factor)

    return chunks.apply(merge, tensors, dtype=dtype, unit=max(each.unit for each in thin))


def rescaled(thin: Thin, base: Tensor, model: Tensor) -> Thin:
    """Thinning that brings the task vector back to the l1 norm it had; without one, or of zeros, as it is."""
    before, after = lengths(thin, base, model)
    return replace(thin, times=before / after) if before and after else thin


def lengths(thin: Thin, base: Tensor, model: Tensor) -> tuple[float, float]:
    """The l1 norm of a task vector, and of what thinning leaves of it (`times` left out)."""
    magnitudes, places = _limits(thin)
    cuts, ends = chunks.of_working_type([base, model], magnitudes), np.array(places, dtype=np.int64)
    work = chunks.work([base, model], 2)
    before = after = 0.0
    for begin, parts in chunks.pieces([base, model], thin.unit):
        (factors,) = _factors([thin], begin, parts[0].size, work.dtype)
        found = chunks.kernels().lengths(*parts, work, cuts, ends - begin, factors, np.int32(thin.level))
        before, after = before + found[0], after + found[1]
    return before, after


def _limits(thin: Thin) -> tuple[tuple[float, float], tuple[int, int]]:
    """Magnitudes and places of the two cuts."""
    return (thin.kept.magnitude, thin.dropped.magnitude), (thin.kept.ties_end, thin.dropped.ties_end)


def _factors(thin: Sequence[Thin], begin: int, size: int, dtype: np.dtype) -> tuple[chunks.Array, ...]:
    """What elements of a piece are multiplied by, or their random bits, of each model; empty where nothing is."""
    given = [each.factors(begin, size) if each.factors else None for each in thin]
    kind = next((each.dtype for each in given if each is not None), dtype)
    return tuple(np.empty(0, kind) if each is None else each for each in given)
