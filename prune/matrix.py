"""One matrix: made sparse or thin as a recipe asks, and what the report tells of it. No names here, and no files."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wtool.grid import Clip, Quantized
from wtool.statistics import Gram, Moments, relative_errors

from .lowrank import Factors, break_even, spectrum, truncate
from .magnitude import magnitude_mask
from .pattern import Sparsity, dense_tail
from .recipe import METHODS, PruneRecipe
from .ria import ria_mask
from .sparsegpt import sparsegpt
from .wanda import input_norm, wanda_mask


@dataclass(frozen=True)
class Fed:
    """What is known of a matrix's inputs."""

    tokens: int = 0
    dropped: int = 0  # tokens left out because a value was not finite
    norm: Tensor | None = None  # [in], root of the mean square
    gram: Tensor | None = None  # [in, in], mean of x xᵀ


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix."""

    weight: Tensor  # [out, in], of the type it had
    keep: Tensor | None = None  # bool [out, in], of a sparse one
    factors: Factors | None = None  # of a thin one
    quantized: Quantized | None = None  # of one that is rounded too
    damping: float | None = None
    fallback: str | None = None  # why another method took over
    notes: tuple[str, ...] = ()


def fed(statistic: Gram | Moments) -> Fed:
    """What was gathered, as methods take it."""
    tokens, dropped = statistic.tokens, statistic.dropped
    if isinstance(statistic, Moments):
        return Fed(tokens, dropped, norm=statistic.mean_square.sqrt())
    return of_gram(statistic.finish(), tokens, dropped)


def of_gram(gram: Tensor, tokens: int, dropped: int) -> Fed:
    """What a Gram matrix [in, in] tells."""
    return Fed(tokens, dropped, input_norm(gram), gram)


def sparse(weight: Tensor, inputs: Fed, asked: Sparsity, recipe: PruneRecipe, scale_dtype: torch.dtype) -> Pruned:
    """Drop weights [out, in].

    scale_dtype: of the scales of what is rounded too
    """
    assert recipe.method is not None
    tail = dense_tail(weight.shape[1], asked)
    notes = (f"the last {tail} columns of {weight.shape[1]} stay dense",) if tail else ()
    fallback = None
    if recipe.method == "sparsegpt" and (inputs.gram is not None or recipe.grid is not None):
        gram = torch.zeros(weight.shape[1], weight.shape[1]) if inputs.gram is None else inputs.gram
        clip = None if recipe.grid is None else Clip()
        found = sparsegpt(
            weight, gram, asked, damping=recipe.damping, grid=recipe.grid, scale_dtype=scale_dtype, clip=clip
        )
        return Pruned(found.weight, found.keep, None, found.quantized, found.damping, found.fallback, notes)
    if METHODS[recipe.method].gathers != "nothing" and inputs.tokens == 0:
        fallback = "no token came to it: by magnitude"
        unknown = torch.zeros(weight.shape[1], device=weight.device)  # counts as many of every row as ever
        by_row = recipe.method == "wanda"
        keep = wanda_mask(weight, unknown, asked) if by_row else magnitude_mask(weight, asked)
    elif recipe.method == "magnitude":
        keep = magnitude_mask(weight, asked)
    else:
        assert inputs.norm is not None
        if not bool(inputs.norm.any()):
            fallback = "its inputs were all 0: by the weights alone"
        keep = (wanda_mask if recipe.method == "wanda" else ria_mask)(weight, inputs.norm, asked)
    return Pruned(weight.masked_fill(~keep, 0), keep, fallback=fallback, notes=notes)


def thin(weight: Tensor, inputs: Fed, rank: int | None) -> Pruned:
    """A matrix [out, in] of a rank; None is as it is."""
    if rank is None:
        least = break_even((weight.shape[0], weight.shape[1]))
        return Pruned(weight, notes=(f"as it is: two factors are smaller only up to rank {least}",))
    factors = truncate(weight, spectrum(weight, inputs.gram), rank)
    return Pruned((factors.u.float() @ factors.v.float()).to(weight.dtype), factors=factors)


def explain(weight: Tensor, pruned: Pruned, inputs: Fed) -> dict[str, Any]:
    """What the report tells of a linear.

    weight: as it was, [out, in]
    """
    told: dict[str, Any] = {"tokens": inputs.tokens}
    if pruned.keep is not None:
        told["sparsity"] = round(1 - float(pruned.keep.float().mean(dtype=torch.float64)), 6)
    if pruned.factors is not None:
        told["rank"] = pruned.factors.v.shape[0]
    if inputs.gram is None:
        error = weight.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(error).clamp(min=1e-30)
        told["weight_error"] = round(float(torch.linalg.vector_norm(error.sub_(pruned.weight)) / norm), 6)
    else:
        (errors,) = relative_errors(weight, inputs.gram, [pruned.weight.float()])
        told |= {"weight_error": round(errors.weight, 6), "output_error": round(errors.output, 6)}
    told |= {"damping": pruned.damping} if pruned.damping is not None else {}
    told |= {"dropped_tokens": inputs.dropped} if inputs.dropped else {}
    told |= {"fallback": pruned.fallback} if pruned.fallback else {}
    return told | ({"notes": list(pruned.notes)} if pruned.notes else {})
