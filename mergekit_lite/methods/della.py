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

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wtool.pieces import InPieces, Pieces
from wtool.random_bits import RandomBits

from ..arithmetic import chunks
from ..arithmetic.random_mask import LEVELS
from ..arithmetic.selection import Magnitudes
from ..arithmetic.task_vectors import WHOLE, Thin, lengths, merge_task_vectors
from .dare import Rescale


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
    masks = _masks(base, models, density, epsilon, key, rescale)
    return _merge(base, models, masks, weight, True, normalize, lambda_, dtype)


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
    masks = _masks(base, models, density, epsilon, key, rescale)
    return _merge(base, models, masks, weight, False, normalize, lambda_, dtype)


class RankMask:
    """The random factors of a tensor's elements: 0 where one is dropped, else what it is scaled by.

    is_scaled: whether what is kept is divided by its probability
    """

    def __init__(self, columns: int, density: float, epsilon: float, key: int, *, is_scaled: bool):
        levels = rank_levels(columns, density, epsilon)
        self.ratio = 1.0  # of l1 norms, before and after
        self._last = np.maximum(levels - 1, 0).astype(np.uint16)  # an element is kept where its bits are no more
        scale = LEVELS / np.maximum(levels, 1) if is_scaled else 1.0
        self._factors = np.where(levels > 0, scale, 0.0)
        self._bits = RandomBits(key)

    def factors(self, begin: int, base: Tensor, model: Tensor) -> chunks.Array:
        """Of some rows, one after the other.

        begin:       the number of the first row's first element
        base, model: [rows, columns]
        """
        keys = _ascending(base, model)
        numbers = self._bits.take(begin, keys.size)
        factors = chunks.of_working_type([base, model], self._factors)
        found = chunks.empty([base, model], keys.size)
        chunks.kernels().factors_of_ranks(keys, numbers, self._last, factors, found)
        return found

    def thin(self, begin: int, base: Tensor, model: Tensor) -> Thin:
        """Thinning of some rows; parameters as for `factors`."""
        found = self.factors(begin, base, model)
        return Thin(factors=lambda first, count: found[first : first + count], times=self.ratio)


def rank_levels(columns: int, density: float, epsilon: float) -> NDArray[np.int64]:
    """The probabilities of the ranks, the smallest magnitude's first, in units of 1 / LEVELS."""
    epsilon = min(epsilon, density, 1.0 - density)
    place = np.linspace(-1.0, 1.0, columns) if columns > 1 else np.zeros(1)
    return np.rint((density + epsilon * place) * LEVELS).astype(np.int64)


def _ascending(base: Tensor, model: Tensor) -> NDArray[np.uint64]:
    """In each row of a matrix, from the element of the smallest magnitude to the largest: their columns, in the low
    halves.

    A magnitude's bits sort as it does. With the place below them in one integer, one sort of integers, for which numpy
    has vector instructions, orders magnitudes and breaks ties: rows of 4096 in an eighth of torch.argsort's time.
    """
    if chunks.working_type([base, model]) == torch.float64:
        magnitudes = model.double().sub(base).abs_()
        return magnitudes.argsort(dim=1, stable=True).numpy().view(np.uint64).reshape(-1)
    keys = np.empty(base.numel(), dtype=np.uint64)
    for begin, magnitudes in Magnitudes([base, model]).pieces():
        place, out = begin % base.shape[1], keys[begin : begin + magnitudes.size]
        chunks.kernels().rank_keys(magnitudes, base.shape[1], place, out)
    keys.reshape(base.shape).sort(axis=1)
    return keys


def _masks(
    base: Tensor,
    models: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    key: Sequence[int],
    rescale: Rescale,
) -> list[RankMask | None]:
    """One a model; None where all is kept."""
    masks: list[RankMask | None] = []
    for model, share, spread, name in zip(models, density, epsilon, key, strict=True):
        mask = RankMask(_columns(base), share, spread, name, is_scaled=rescale == "density") if share < 1.0 else None
        if mask and rescale == "l1":
            mask.ratio = _length_ratio(base, model, mask)
        masks.append(mask)
    return masks


def _length_ratio(base: Tensor, model: Tensor, mask: RankMask) -> float:
    """How much the l1 norm of a task vector shrinks by thinning; 1 where it is or becomes 0."""
    found = [lengths(mask.thin(begin, b, m), b, m) for begin, (b, m) in _rows([base, model])]
    before, after = (sum(norms) for norms in zip(*found, strict=True)) if found else (0.0, 0.0)
    return before / after if before and after else 1.0


def _merge(
    base: Tensor,
    models: Sequence[Tensor],
    masks: Sequence[RankMask | None],
    weight: Sequence[float],
    elect: bool,
    normalize: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> Pieces:
    """A few rows at a time, as ranks are within rows."""
    columns = _columns(base)
    matrices = [tensor.reshape(-1, columns) for tensor in (base, *models)]

    def fill(begin: int, out: Tensor) -> None:
        first = begin // columns
        original, *tuned = (matrix[first : first + out.numel() // columns] for matrix in matrices)
        thin = [mask.thin(begin, original, model) if mask else WHOLE for mask, model in zip(masks, tuned, strict=True)]
        merged = merge_task_vectors(
            original, tuned, thin=thin, weight=weight, elect=elect, normalize=normalize, scale=scale, dtype=out.dtype
        )
        merged.fill(0, out)

    return Pieces(base.shape, chunks.result_type([base, *models], dtype), fill, unit=columns)


def _columns(tensor: Tensor) -> int:
    return max(tensor.shape[-1], 1) if tensor.dim() else 1


def _rows(tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (first element, matrices of whole rows): about as many elements as a piece has, or one row."""
    columns = _columns(tensors[0])
    matrices = [tensor.reshape(-1, columns) for tensor in tensors]
    step = max(chunks.CHUNK // columns, 1)
    for row in range(0, len(matrices[0]), step):
        yield row * columns, [matrix[row : row + step] for matrix in matrices]
