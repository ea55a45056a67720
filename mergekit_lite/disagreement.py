"""How far the models of a merge pull apart, and where the merge went: figures of each matrix for the report.

With task vectors d_i = theta_i - theta_0 and the merge theta: the share of weights that one model moved up and another
down (the conflicts that TIES elects signs for, Yadav et al., 2023, https://arxiv.org/abs/2306.01708, section 3), the
cosine between task vectors, how far models and merge are from the base (||d_i|| / ||theta_0||), and the share of the
weights that were moved which the merge left alone: what a method trimmed, elected away, or lost to rounding. They are
of a sample, which is taken as the merge is made and written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import isfinite, sqrt

import numpy as np
import torch
from torch import Tensor

from wtool.pieces import Pieces

LEAST = 4096  # weights of a matrix that tells its figures
RUNS, RUN = 64, 256  # of neighbours, evenly spaced; matrices of no more weights are looked at whole
ONE_OF = 8  # of the runs of a larger matrix tells what rounding does, for which it is made once more


class Watch:
    """A merge of which a sample is taken as it is made.

    made:  the merge as it is written
    exact: before it is rounded, able to fill in the wider type `kind`
    """

    def __init__(self, made: Pieces, exact: Pieces, kind: torch.dtype):
        self.result = np.zeros(min(made.count, RUNS * RUN))
        self.exact: list[tuple[slice, np.ndarray]] = []  # of parts of the sample, where it is rounded
        self._made, self._exact, self._kind = made, exact, kind

    def pieces(self) -> Pieces:
        """The merge."""
        return replace(self._made, fill=self._fill)

    def _fill(self, begin: int, out: Tensor) -> None:
        runs = list(_runs(self._made.count, begin, begin + out.numel()))
        self._look(begin, runs)
        self._made.fill(begin, out)
        for places, first, last in runs:
            self.result[places] = out[first:last].double().numpy()

    def _look(self, begin: int, runs: Sequence[tuple[slice, int, int]]) -> None:
        """See what is exact, where it is rounded."""
        if self._made.dtype.itemsize < self._kind.itemsize:
            for places, first, last in runs:
                if places.start // RUN % ONE_OF == 0 or self._made.count <= RUNS * RUN:
                    exact = self._exact.some(begin + first, begin + last, self._kind)
                    self.exact.append((places, exact.double().numpy()))


def is_told(tensor: Tensor) -> bool:
    """Whether there are figures of a tensor: not of vectors and small matrices."""
    return tensor.dim() >= 2 and tensor.numel() >= LEAST


@np.errstate(all="ignore")
def figures(base: Tensor, models: Sequence[Tensor], merged: Watch) -> dict[str, float]:
    """What the report tells of a matrix.

    base, models: of one shape
    merged: which has been made
    returns: conflict, a share in [0, 1]; cosine, the mean over pairs of models, in [-1, 1]; moved, relative, >= 0, the
        root of the mean square over models; change, the same of the merge; kept, how far what was rounded goes along
        the way from the base to what is exact, 1 where rounding loses nothing on it and 0 where it leads back to the
        base; untouched, a share in [0, 1] of the weights that some model moved; what cannot be told (of a single
        model, of zeros) is left out
    """
    origin = sample(base)
    change, moved = merged.result - origin, [sample(model) - origin for model in models]
    told: dict[str, float] = {}
    if len(moved) > 1:
        up, down = (np.any([sign * each > 0 for each in moved], axis=0) for sign in (1, -1))
        told["conflict"] = float(np.mean(up & down))
    cosines = [value for one, other in combinations(moved, 2) if (value := _cosine(one, other)) is not None]
    if cosines:
        told["cosine"] = sum(cosines) / len(cosines)
    if size := _norm(origin):
        told["moved"] = _norm(np.stack(moved)) / sqrt(len(moved)) / size
        told["change"] = _norm(change) / size
    ways = [(places, exact - origin[places]) for places, exact in merged.exact]
    if length := sum(float(np.sum(way * way)) for _, way in ways):
        told["kept"] = sum(float(np.sum(way * change[places])) for places, way in ways) / length
    if (anywhere := np.any([each != 0 for each in moved], axis=0)).any():
        told["untouched"] = float(np.mean(change[anywhere] == 0))
    return {key: round(value, 6) for key, value in told.items() if isfinite(value)}


def sample(tensor: Tensor) -> np.ndarray:
    """The same places of every tensor of a shape, as float64 [at most RUNS * RUN]."""
    flat = tensor.detach().contiguous().reshape(-1)
    if len(flat) > RUNS * RUN:
        flat = torch.as_strided(flat, (RUNS, RUN), (_stride(len(flat)), 1), flat.storage_offset())
    return flat.double().cpu().numpy().reshape(-1)


def _runs(count: int, begin: int, end: int) -> Iterator[tuple[slice, int, int]]:
    """The parts of the sample that lie in a piece of a tensor: places in the sample, first and end in the piece."""
    if count <= RUNS * RUN:
        yield slice(begin, end), 0, end - begin
        return
    stride = _stride(count)
    for run in range(max((begin - RUN) // stride, 0), min((end - 1) // stride + 1, RUNS)):
        first, last = max(run * stride, begin), min(run * stride + RUN, end)
        if first < last:
            place = run * RUN + first - run * stride
            yield slice(place, place + last - first), first - begin, last - begin


def _stride(count: int) -> int:
    return (count - RUN) // (RUNS - 1)


def _cosine(one: np.ndarray, other: np.ndarray) -> float | None:
    size = _norm(one) * _norm(other)
    return float(np.sum(one * other)) / size if size else None


def _norm(values: np.ndarray) -> float:
    """Without BLAS, whose sums depend on the number of its threads."""
    return float(np.sqrt(np.sum(values * values)))
