"""Cut a checkpoint: of every tensor the rows and columns that stay, streamed one tensor at a time.

The result is the full model with what goes masked, exactly but for two things that count channels: the mean in a
norm is over fewer of them (`scale` can set that right by a measured ratio), and Gemma multiplies its embedding by
√hidden. The latter is made up for in the embedding's weights, and in the final norm's where the head is tied to it.
"""

from collections.abc import Mapping
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint.base import Checkpoint, TensorInfo
from wtool.checkpoint.tied import EMBEDDINGS, HEADS, is_tied
from wtool.dtypes import FLOATS, torch_dtype
from wtool.errors import Mismatch, QuantizedInput
from wtool.layer_stack import keep_layers
from wtool.plan import Step

from .configuration import with_shape
from .families import Family, family_of
from .structure import Kept, Numbers, Shape, axes_of, extents, place_of, shape_of, slices


def cut(
    source: Checkpoint, kept: Kept, *, scale: Mapping[str, float] | None = None
) -> tuple[list[Step], dict[str, Any]]:
    """Plan the cut of a checkpoint.

    scale:  what a norm's output is multiplied by, by the name of its weight before the cut
    returns: steps that read from source 0, which is `source`; and the configuration of what is left
    raises: UsageError if the family cannot express what would be left, Mismatch if tensors and config.json disagree,
        MissingInput if a tensor to scale is not there
    """
    view = keep_layers(source, kept.layers)
    for name in scale or {}:
        if name not in source.tensors:
            raise source.missing(name)
    if not kept.widths and not scale:
        return [_step(source, name, origin) for name, origin in view.origins.items()], view.config
    family, shape = family_of(source.config), shape_of(source.config)
    config = with_shape(source.config, shape, kept)
    factors = _embedding_factors(source, family, shape, kept)
    steps: list[Step] = []
    for name, origin in view.origins.items():
        axes = slices(family, origin, shape, kept)
        if axes is not None:
            check_extents(source, family, origin, shape)
            factor = factors.get(origin, 1.0) * (scale or {}).get(origin, 1.0)
            offset = family.norm_offset if _is_norm(family, origin) else 0
            steps.append(_step(source, _renumbered(name, origin, kept), origin, axes, factor, offset))
    return steps, config


def _step(
    source: Checkpoint,
    name: str,
    origin: str,
    axes: tuple[Numbers | None, ...] = (),
    factor: float = 1.0,
    offset: int = 0,
) -> Step:
    info = source.tensors[origin]
    shape = list(info.shape)
    for axis, stay in enumerate(axes):
        shape[axis] = shape[axis] if stay is None else len(stay)
    function = partial(select, axes=axes, factor=factor, offset=offset, dtype=torch_dtype(info.dtype))
    return Step(((0, origin),), {name: TensorInfo(info.dtype, tuple(shape))}, function)


def select(
    tensor: Tensor, *, axes: tuple[Numbers | None, ...], factor: float, offset: int, dtype: torch.dtype
) -> Tensor:
    """What stays of a tensor along each axis (None: all), multiplied.

    offset: what the model adds to the tensor before it multiplies by it (Gemma's norms: 1)
    """
    for axis, stay in enumerate(axes):
        if stay is not None:
            tensor = tensor.index_select(axis, torch.tensor(stay, dtype=torch.int64))
    if factor != 1.0:
        tensor = (tensor.float() + offset) * factor - offset
    return tensor.to(dtype).contiguous()


def _renumbered(name: str, origin: str, kept: Kept) -> str:
    """The name with its expert's new number."""
    layer, expert = place_of(origin)
    if expert is None or layer not in kept.experts:
        return name
    parts = name.split(".")
    at = [i for i, part in enumerate(parts) if part.isdigit()][1]
    parts[at] = str(kept.experts[layer].index(expert))
    return ".".join(parts)


def check_extents(source: Checkpoint, family: Family, name: str, shape: Shape) -> None:
    """Refuse a tensor that is not what config.json says, before it is cut in the wrong places."""
    info, expected = source.tensors[name], extents(family, name, shape)
    if not expected:
        return
    if info.dtype not in FLOATS:
        raise QuantizedInput(f"{source.label}: tensor '{name}' is packed ({info.dtype}): give the unquantized model")
    fits = len(info.shape) == len(expected)
    if not fits or any(want not in (None, has) for want, has in zip(expected, info.shape, strict=True)):
        wanted = " x ".join("any" if size is None else str(size) for size in expected)
        raise Mismatch(f"{source.label}: tensor '{name}' is {list(info.shape)}, by config.json it would be {wanted}")


def _is_norm(family: Family, name: str) -> bool:
    return "norm" in name.lower() and axes_of(family, name) in ((), ("hidden",))


def _embedding_factors(source: Checkpoint, family: Family, shape: Shape, kept: Kept) -> dict[str, float]:
    """What makes up for an embedding that the model multiplies by the root of fewer channels."""
    if not family.scaled_embedding or kept.hidden is None:
        return {}
    factor = sqrt(shape.hidden / len(kept.hidden))
    tied = is_tied(source.config)
    factors = {name: factor for name in source.tensors if name in EMBEDDINGS or (tied and name in HEADS)}
    final = [name for name in source.tensors if place_of(name)[0] < 0 and _is_final_norm(family, name)]
    return factors | ({name: 1 / factor for name in final} if tied else {})


def _is_final_norm(family: Family, name: str) -> bool:
    return name.endswith(".norm.weight") and axes_of(family, name) == ("hidden",)
