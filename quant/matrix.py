"""One matrix: quantized as a recipe asks, and what the report tells of it. No names here, and no files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wtool.dtypes import torch_dtype
from wtool.grid import Clip, Quantized, some_rows
from wtool.statistics import relative_errors

from .awq import clipped
from .gptq import Outcome, gptq
from .recipe import METHODS, QuantRecipe
from .refine import added, refit_scales
from .rtn import rtn
from .signround import begun

if TYPE_CHECKING:
    from .planner import Layer

CLIP = Clip()
FEWEST_TOKENS = 32  # a matrix that saw fewer is rounded, and the report says so


def quantize(
    weight: Tensor, gram: Tensor, tokens: int, layer: "Layer", recipe: QuantRecipe, cross: Tensor | None = None
) -> Outcome:
    """Quantize weights [out, in] that share an input, by the recipe's method where enough tokens came to them.

    gram, cross: as `gptq` takes them
    """
    if tokens < FEWEST_TOKENS:
        return Outcome(rounded(weight, layer, recipe), None, f"only {tokens} tokens came to it", 0)
    if recipe.method == "awq":
        return Outcome(_rounded_by_outputs(weight, gram, layer, recipe), None, None, int((gram.diagonal() == 0).sum()))
    if METHODS[recipe.method].learned:
        return Outcome(_begun(weight, gram, layer, recipe), None, None, int((gram.diagonal() == 0).sum()))
    return gptq(
        weight,
        gram,
        layer.scheme.grid,
        scale_dtype=torch_dtype(layer.scale_dtype),
        damping=recipe.damping,
        act_order=recipe.act_order,
        static_groups=recipe.static_groups,
        clip=_clip(recipe),
        refine=recipe.refine,
        refit=True,
        cross=cross,
    )


def rounded(weight: Tensor, layer: "Layer", recipe: QuantRecipe) -> Quantized:
    """Weights [out, in] by rounding alone."""
    return rtn(weight, layer.scheme.grid, scale_dtype=torch_dtype(layer.scale_dtype), clip=_clip(recipe))


def _rounded_by_outputs(weight: Tensor, gram: Tensor, layer: "Layer", recipe: QuantRecipe) -> Quantized:
    """Weights [out, in] by rounding, clipped where the outputs gain by it, the scales at their best for the codes."""
    grid, dtype = layer.scheme.grid, torch_dtype(layer.scale_dtype)
    if recipe.clip and not layer.makes_queries_or_keys:
        found = clipped(weight, gram, grid, scale_dtype=dtype)
    else:
        found = rtn(weight, grid, scale_dtype=dtype)
    return refit_scales(weight, gram, added(gram, recipe.damping), found)


def _begun(weight: Tensor, gram: Tensor, layer: "Layer", recipe: QuantRecipe) -> Quantized:
    """Weights [out, in] by rounding, on the grid that learning starts from."""
    grid, dtype = layer.scheme.grid, torch_dtype(layer.scale_dtype)
    return begun(weight, gram.diagonal() + added(gram, recipe.damping), grid, scale_dtype=dtype, clip=_clip(recipe))


def split(quantized: Quantized, rows: Sequence[int]) -> list[Quantized]:
    """A quantized matrix as matrices of some rows each."""
    zeros = [None] * len(rows) if quantized.zeros is None else quantized.zeros.split(list(rows))
    parts = zip(quantized.codes.split(list(rows)), quantized.scales.split(list(rows)), zeros, strict=True)
    return [Quantized(codes, scales, zero, quantized.group_index) for codes, scales, zero in parts]


def explain(
    weight: Tensor,
    gram: Tensor | None,
    outcome: Outcome,
    layer: "Layer",
    tokens: int,
    dropped: int,
) -> dict[str, Any]:
    """What the report tells of a linear.

    weight: as it was, [out, in]
    gram: of its input; None where nothing is known of it
    """
    grid = layer.scheme.grid
    told: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size, "tokens": tokens}
    if gram is None:
        told["weight_error"] = round(_weight_error(weight, outcome.quantized), 6)
    else:
        simple = rtn(weight, grid, scale_dtype=torch_dtype(layer.scale_dtype)).values()
        after, before = relative_errors(weight, gram, [outcome.quantized.values(), simple])
        told |= {
            "weight_error": round(after.weight, 6),
            "output_error": round(after.output, 6),
            "rtn_output_error": round(before.output, 6),
        }
    told |= {"damping": outcome.damping, "dead_inputs": outcome.dead}
    told |= {"dropped_tokens": dropped} if dropped else {}
    return told | ({"fallback": outcome.fallback} if outcome.fallback else {})


def _weight_error(weight: Tensor, quantized: Quantized) -> float:
    """The norm of what rounding changed, as a share of the norm of the weights [out, in]."""
    lost = whole = 0.0
    for rows in some_rows(weight):
        part = weight[rows].float()
        whole += float(torch.linalg.vector_norm(part)) ** 2
        lost += float(torch.linalg.vector_norm(part - quantized.rows(rows).values())) ** 2
    return (lost / whole) ** 0.5 if whole else 0.0


def _clip(recipe: QuantRecipe) -> Clip | None:
    return CLIP if recipe.clip else None
