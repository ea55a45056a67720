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

from ..arithmetic import chunks
from ..arithmetic.random_mask import LEVELS, RandomBits
from ..arithmetic.task_vectors import Thin, lengths, merge_task_vectors, rescaled
from .dare import Rescale


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
) -> Tensor:
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
) -> Tensor:
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

    def thin(self, begin: int, base: Tensor, model: Tensor) -> Thin:
        """Thinning of some rows.

        begin:       the number of the first row's first element
        base, model: [rows, columns]
        """
        kind = chunks.working_type([base, model])
        order = _ascending(model.to(kind).sub(base).abs_())
        numbers = self._bits.take(begin, order.numel()).reshape(base.shape)
        chosen = np.multiply(
            numbers <= self._last, self._factors.astype(np.float32 if kind == torch.float32 else float)
        )
        factors = torch.empty(order.numel(), dtype=kind).scatter_(0, order, torch.from_numpy(chosen).view(-1))

        def drop(begin: int, part: Tensor, spare: Tensor) -> None:
            part.mul_(factors[begin : begin + part.numel()])

        return drop if self.ratio == 1.0 else rescaled(drop, self.ratio)


def rank_levels(columns: int, density: float, epsilon: float) -> NDArray[np.int64]:
    """The probabilities of the ranks, the smallest magnitude's first, in units of 1 / LEVELS."""
    epsilon = min(epsilon, density, 1.0 - density)
    place = np.linspace(-1.0, 1.0, columns) if columns > 1 else np.zeros(1)
    return np.rint((density + epsilon * place) * LEVELS).astype(np.int64)


def _ascending(magnitude: Tensor) -> Tensor:
    """The places of a matrix, counted through its rows, in each row from the smallest magnitude to the largest.

    A magnitude's bits sort as it does. With the place below them in one integer, one sort of integers, for which numpy
    has vector instructions, orders magnitudes and breaks ties: rows of 4096 in an eighth of torch.argsort's time.
    """
    places = torch.arange(magnitude.numel()).view(magnitude.shape)
    if magnitude.dtype == torch.float64:
        return places.gather(1, magnitude.argsort(dim=1, stable=True)).view(-1)
    keys = np.empty((*magnitude.shape, 2), dtype=np.uint32)
    keys[..., 0], keys[..., 1] = places.numpy(), magnitude.numpy().view(np.uint32)  # the low half comes first
    packed = keys.reshape(len(keys), -1).view(np.uint64)
    packed.sort(axis=1)
    packed &= np.uint64(0xFFFFFFFF)
    return torch.from_numpy(packed.view(np.int64)).view(-1)


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
    found = [lengths(b, m, mask.thin(begin, b, m)) for begin, (b, m) in _rows([base, model])]
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
) -> Tensor:
    """A few rows at a time, as ranks are within rows."""
    result = torch.empty(base.shape, dtype=chunks.result_type([base, *models], dtype))
    flat = result.view(-1)
    for begin, (original, *tuned) in _rows([base, *models]):
        thin = [mask and mask.thin(begin, original, model) for mask, model in zip(masks, tuned, strict=True)]
        merged = merge_task_vectors(
            original,
            tuned,
            thin=thin,
            weight=weight,
            elect=elect,
            normalize=normalize,
            scale=scale,
            dtype=result.dtype,
        )
        flat[begin : begin + merged.numel()].copy_(merged.view(-1))
    return result


def _columns(tensor: Tensor) -> int:
    return max(tensor.shape[-1], 1) if tensor.dim() else 1


def _rows(tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (first element, matrices of whole rows): about as many elements as a piece has, or one row."""
    columns = _columns(tensors[0])
    matrices = [tensor.reshape(-1, columns) for tensor in tensors]
    step = max(chunks.CHUNK // columns, 1)
    for row in range(0, len(matrices[0]), step):
        yield row * columns, [matrix[row : row + step] for matrix in matrices]
