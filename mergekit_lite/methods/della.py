"""DELLA: drop elements of every task vector at random, the smaller the likelier, scale up the rest, elect signs, sum.

Deep, Bhardwaj and Poria, "DELLA-Merging: reducing interference in model merging through magnitude-based sampling",
2024, https://arxiv.org/abs/2406.11617 (section 3.1, MAGPRUNE). The element of rank k among the n of its row (the last
axis; a vector is one row), from 0 for the smallest magnitude, is kept with probability

    p_k = density - epsilon + 2 epsilon k / (n - 1),      d <- m d / p,  m ~ Bernoulli(p)

so that every element keeps its expectation. Of equal magnitudes the earlier has the lower rank; of a row of one
element p is the density. mergekit instead scales each thinned vector back to the l1 norm it had before; that is
`rescale="l1"`. Where density +- epsilon is outside [0, 1], mergekit fails; here epsilon shrinks until it is inside.

The random numbers belong to ranks, not to places: the k-th of a row always has the same one. Beside the result this
takes the memory of a few pieces, or of a few rows where those are longer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wtool.pieces import InPieces, Pieces
from wtool.random_bits import RandomBits

from ..arithmetic import chunks
from ..arithmetic.random_mask import LEVELS
from ..arithmetic.task_vectors import WHOLE, Thin, merge_task_vectors, rescaled
from .dare import Rescale

TOGETHER = 1 << 18  # elements whose keys are made, sorted and used together, so that they stay in the second cache


@InPieces
def della(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    key: Sequence[int],
    rescale: Rescale = "density",
    normalize: bool = True,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Drop by rank, rescale, elect signs, merge.

    weight:    one a model
    density:   mean probability that an element is kept, in [0, 1], one a model
    epsilon:   how far a row's smallest and largest element are from that, >= 0, one a model; it counts as the density
        or as 1 - density where it is more than one of them
    key:       names each model's mask, see `random_mask.mask_key`
    rescale:   "density" (the paper: divide each element by its probability), "l1" (mergekit: back to the l1 norm
        before), or "none"
    normalize: divide each element by the sum of the weights that agree with the elected sign
    lambda_:   factor of the merged task vector
    """
    thin = _drop(base, models, density, epsilon, key, rescale)
    return merge_task_vectors(
        base, models, thin=thin, weight=weight, elect=True, normalize=normalize, scale=lambda_, dtype=dtype
    )


@InPieces
def della_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    key: Sequence[int],
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Pieces:
    """Drop by rank, rescale, sum; parameters as for `della`.

    normalize: divide the sum by the weights' sum
    """
    thin = _drop(base, models, density, epsilon, key, rescale)
    return merge_task_vectors(
        base, models, thin=thin, weight=weight, elect=False, normalize=normalize, scale=lambda_, dtype=dtype
    )


class RankMask:
    """The random factors of a task vector's elements: 0 where one is dropped, else what it is scaled by.

    is_scaled: whether what is kept is divided by its probability
    """

    def __init__(self, base: Tensor, model: Tensor, density: float, epsilon: float, key: int, *, is_scaled: bool):
        self._flat, self._columns = [base.reshape(-1), model.reshape(-1)], columns(base)
        levels = rank_levels(self._columns, density, epsilon)
        self._last = np.maximum(levels - 1, 0).astype(np.uint16)  # an element is kept where its bits are no more
        scale = LEVELS / np.maximum(levels, 1) if is_scaled else 1.0
        self._factors = chunks.of_working_type(self._flat, np.where(levels > 0, scale, 0.0))
        self._bits = RandomBits(key)

    def factors(self, begin: int, count: int) -> chunks.Array:
        """Of whole rows, one after the other.

        begin: the first row's first element; count: of elements
        """
        found = chunks.empty(self._flat, count)
        size = max(TOGETHER // self._columns, 1) * self._columns
        for first in range(0, count, size):
            some = found[first : first + size]
            keys = self._ascending(begin + first, some.size)
            numbers = self._bits.take(begin + first, some.size)
            chunks.kernels().factors_of_ranks(keys, numbers, self._last, self._factors, some)
        return found

    def _ascending(self, begin: int, count: int) -> NDArray[np.uint64]:
        """In each row, from the element of the smallest magnitude to the largest: their columns, in the low halves.

        A magnitude's bits sort as it does. With the place below them in one integer, one sort of integers, for which
        numpy has vector instructions, orders magnitudes and breaks ties: rows of 4096 in an eighth of torch.argsort's
        time.
        """
        pair = [tensor[begin : begin + count] for tensor in self._flat]
        if chunks.working_type(pair) == torch.float64:
            base, model = (tensor.double().view(-1, self._columns) for tensor in pair)
            return model.sub(base).abs_().argsort(dim=1, stable=True).numpy().view(np.uint64).reshape(-1)
        keys, work = np.empty(count, dtype=np.uint64), chunks.work(pair, 4)
        for first, parts in chunks.spans(pair):
            some = keys[first : first + parts[0].size]
            chunks.kernels().rank_keys(parts, self._columns, first % self._columns, some, work)
        keys.reshape(-1, self._columns).sort(axis=1)
        return keys


def rank_levels(columns: int, density: float, epsilon: float) -> NDArray[np.int64]:
    """The probabilities of the ranks, the smallest magnitude's first, in units of 1 / LEVELS."""
    epsilon = min(epsilon, density, 1.0 - density)
    place = np.linspace(-1.0, 1.0, columns) if columns > 1 else np.zeros(1)
    return np.rint((density + epsilon * place) * LEVELS).astype(np.int64)


def columns(tensor: Tensor) -> int:
    """Of a row, along which elements have ranks."""
    return max(tensor.shape[-1], 1) if tensor.dim() else 1


def _drop(
    base: Tensor,
    models: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    key: Sequence[int],
    rescale: Rescale,
) -> list[Thin]:
    """One a model."""
    found: list[Thin] = []
    for model, share, spread, name in zip(models, density, epsilon, key, strict=True):
        if share >= 1.0:
            found.append(WHOLE)
            continue
        mask = RankMask(base, model, share, spread, name, is_scaled=rescale == "density")
        thin = Thin(factors=mask.factors, unit=columns(base))
        found.append(rescaled(thin, base, model) if rescale == "l1" else thin)
    return found
