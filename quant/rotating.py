"""Rotation before the grid: the checkpoint that is quantized, in a basis in which weights have no outliers.

R1 and R2 of SpinQuant (Liu et al., 2024, https://arxiv.org/abs/2405.16406) by randomized Hadamard matrices, as in
QuaRot (Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456): what can be folded into the weights, so that every
runtime loads the result. What those papers turn while the model runs (queries and keys, the inputs of down_proj) is
left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.hadamard import in_words, random_turn
from wtool.plan import Step
from wtool.rotated import Rotated

from .recipe import QuantRecipe


def open_source(recipe: QuantRecipe, *, headers_only: bool = False, low_disk: Path | None = None) -> Checkpoint:
    """The checkpoint to quantize, rotated if the recipe asks for it.

    raises: InputError, UsageError for a family that cannot be rotated
    """
    source = open_checkpoint(recipe.model, headers_only=headers_only, low_disk=low_disk)
    if recipe.rotate == "none":
        return source
    headers = Rotated(source, None)  # refuses what cannot be turned, before a matrix is made
    if headers_only:
        return headers
    stream = random_turn(source.config["hidden_size"], recipe.rotate_seed)
    if recipe.rotate == "residual":
        return Rotated(source, stream)
    return Rotated(source, stream, random_turn(headers.head_dim, recipe.rotate_seed + 1))


def as_it_lies(source: Checkpoint) -> Checkpoint:
    """The checkpoint as the user has it."""
    return source.source if isinstance(source, Rotated) else source


def rotation_told(recipe: QuantRecipe, source: Checkpoint) -> dict[str, Any]:
    """What is turned and by what, for the manifest; nothing where nothing is."""
    if not isinstance(source, Rotated):
        return {}
    told: dict[str, Any] = {"residual": in_words(source.config["hidden_size"])}
    if recipe.rotate == "residual+values":
        told["values"] = in_words(source.head_dim)
    return {"rotation": told}


def rotation_noted(source: Checkpoint) -> dict[str, Any]:
    """What tells one rotation from another, beside a recipe."""
    return {"rotation": source.digest} if isinstance(source, Rotated) and source.digest else {}


def rotation_warnings(source: Checkpoint, steps: Sequence[Step]) -> list[str]:
    return source.warnings(steps) if isinstance(source, Rotated) else []
