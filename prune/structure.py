"""The sizes of a model, what of it is to stay, and what that means for each of its tensors.

A traced graph is not needed: the table of families tells what every axis counts, so a checkpoint is cut from its
headers alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from wtool.errors import Mismatch, UsageError
from wtool.layer_rules import depth_key, explicit, text_config

from .families import FAMILIES as FAMILIES
from .families import Family, family_of

Numbers = tuple[int, ...]  # what stays, in ascending order


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; None for what its family does not have."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int | None = None  # channels of a dense feed-forward block
    experts: int | None = None  # of a layer that has them
    expert_ffn: int | None = None
    top_k: int | None = None  # experts each token goes to
    dense: frozenset[int] = frozenset()  # the layers with a dense feed-forward block


@dataclass(frozen=True)
class Kept:
    """What stays of a model. Layers are named by their numbers before the cut; a layer that is not named is whole.

    Where only one of `heads` and `kv_heads` is given of a layer, the other follows: key-value heads go when all of
    their query heads go, and take their query heads with them.
    """

    layers: Numbers  # in their new order
    hidden: Numbers | None = None
    ffn: Mapping[int, Numbers] = field(default_factory=dict)
    heads: Mapping[int, Numbers] = field(default_factory=dict)
    kv_heads: Mapping[int, Numbers] = field(default_factory=dict)
    experts: Mapping[int, Numbers] = field(default_factory=dict)
    expert_ffn: Mapping[tuple[int, int], Numbers] = field(default_factory=dict)  # by (layer, expert)

    @property
    def widths(self) -> bool:
        """Whether anything but layers is taken out."""
        return self.hidden is not None or any(
            (self.ffn, self.heads, self.kv_heads, self.experts, self.expert_ffn),
        )


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes that config.json tells, with the family's defaults for what it lacks.

    raises: UsageError if the family is not in the table or a size is missing
    """
    family, text = family_of(config), text_config(config)
    layers = range(text[depth_key(text)])
    sizes = {size: _size(family, text, size) for size in family.keys}
    hidden, heads = (sizes[size] or _missing(family, size) for size in ("hidden", "heads"))
    head_dim = (text.get("head_dim") or family.defaults.get("head_dim")) if family.has_head_dim else None
    dense = explicit(text).get("mlp_only_layers") or () if "experts" in family.keys else layers
    return Shape(
        layers=len(layers),
        hidden=hidden,
        heads=heads,
        kv_heads=sizes.get("kv_heads") or heads,
        head_dim=head_dim or hidden // heads,
        ffn=sizes.get("ffn") or (4 * hidden if "ffn" in family.keys else None),  # gpt2's may be left out
        experts=sizes.get("experts"),
        expert_ffn=sizes.get("expert_ffn"),
        top_k=sizes.get("top_k"),
        dense=frozenset(dense),
    )


def _size(family: Family, text: Mapping[str, Any], size: str) -> int | None:
    """A size as config.json spells it; a null is not the same as a key that is not there."""
    for key in family.keys[size]:
        if key in text:
            return text[key]
    return family.defaults.get(size)


def _missing(family: Family, size: str) -> int:
    raise UsageError(f"config.json lacks '{family.keys[size][0]}'")


def kept_heads(kept: Kept, shape: Shape, layer: int) -> tuple[Numbers | None, Numbers | None]:
    """The query and the key-value heads that stay in a layer; None for all.

    shape: before the cut
    """
    heads, kv = kept.heads.get(layer), kept.kv_heads.get(layer)
    group = shape.heads // shape.kv_heads
    if heads is not None and kv is None:
        kv = tuple(sorted({head // group for head in heads}))
    if kv is not None and heads is None:
        heads = tuple(group * number + i for number in kv for i in range(group))
    return heads, kv


def cut_shape(shape: Shape, kept: Kept) -> Shape:
    """The sizes that are left.

    raises: UsageError if a number is not there, or if layers would end with different counts: a configuration holds
        one number for all of them
    """
    layers = kept.layers
    _check_named(shape, kept)
    heads = {layer: kept_heads(kept, shape, layer) for layer in layers}
    inside: dict[str, Numbers | None] = {}
    for layer in layers:
        for expert in kept.experts.get(layer, range(shape.experts or 0)) if layer not in shape.dense else ():
            inside[f"layer {layer}, expert {expert}"] = kept.expert_ffn.get((layer, expert))
    after = replace(
        shape,
        layers=len(layers),
        hidden=_count("hidden channels", shape.hidden, {"the model": kept.hidden}),
        heads=_count("heads", shape.heads, {f"layer {n}": queries for n, (queries, _) in heads.items()}),
        kv_heads=_count("key-value heads", shape.kv_heads, {f"layer {n}": kv for n, (_, kv) in heads.items()}),
        ffn=_count("ffn channels", shape.ffn, {f"layer {n}": kept.ffn.get(n) for n in layers if n in shape.dense}),
        experts=_count(
            "experts", shape.experts, {f"layer {n}": kept.experts.get(n) for n in layers if n not in shape.dense}
        ),
        expert_ffn=_count("channels", shape.expert_ffn, inside),
        dense=frozenset(new for new, old in enumerate(layers) if old in shape.dense),
    )
    for layer, (queries, kv) in heads.items():
        _check_groups(shape, layer, queries, kv)
    return after


def _check_named(shape: Shape, kept: Kept) -> None:
    """Refuse what is said of layers that are not there, or that have no such part."""
    sparse = frozenset(range(shape.layers)) - shape.dense
    everywhere = shape.dense | sparse
    parts: list[tuple[str, Iterable[int], frozenset[int]]] = [
        ("heads", (*kept.heads, *kept.kv_heads), everywhere),
        ("dense ffn channels", kept.ffn, shape.dense),
        ("experts", (*kept.experts, *(layer for layer, _ in kept.expert_ffn)), sparse),
    ]
    for part, named, there in parts:
        for layer in named:
            if layer not in there:
                has = f"has no {part}" if layer in everywhere else f"is not there: there are 0 to {shape.layers - 1}"
                raise UsageError(f"layer {layer} {has}")


def _count(what: str, size: Any, stay: Mapping[str, Numbers | None]) -> Any:
    """How many stay, the same number in every place; the size as it was where there is no such place."""
    places: dict[int, str] = {}  # by the number that stays
    for place, numbers in stay.items():
        found = range(size) if numbers is None else numbers
        if not found or list(found) != sorted({*found}) or found[0] < 0 or found[-1] >= size:
            raise UsageError(f"{place}: {what} to keep must be some of 0 to {size - 1} in ascending order")
        places.setdefault(len(found), place)
    if len(places) > 1:
        (one, here), (other, there), *_ = places.items()
        raise UsageError(
            f"a configuration holds one number of {what} for all, but {one} would stay in {here} and {other} in {there}"
        )
    return next(iter(places), size)


def _check_groups(shape: Shape, layer: int, heads: Numbers | None, kv: Numbers | None) -> None:
    """Refuse query heads that are not shared out evenly over the key-value heads that stay."""
    if heads is None or kv is None:
        return
    group = shape.heads // shape.kv_heads
    served = [head // group for head in heads]
    if set(served) != set(kv) or len({served.count(number) for number in kv}) != 1:
        shares = ", ".join(f"{number}: {served.count(number)}" for number in sorted({*served, *kv}))
        raise UsageError(
            f"layer {layer}: each key-value head that stays must have equally many query heads, and no other any; "
            f"{list(kv)} stay, and the query heads that stay are shared out as {{{shares}}}"
        )


def slices(family: Family, name: str, shape: Shape, kept: Kept) -> tuple[Numbers | None, ...] | None:
    """What stays of a tensor, by the numbers along each of its axes; None for an axis that stays whole.

    name:  as in the checkpoint before the cut
    shape: before the cut
    returns: None for a tensor that goes with its expert; fewer axes than the tensor has where all of it stays
    raises: Mismatch if the family's table does not have the tensor
    """
    layer, expert = place_of(name)
    if expert is not None and expert not in kept.experts.get(layer, (expert,)):
        return None
    return tuple(_axis(axis, shape, kept, layer, expert)[1] for axis in axes_of(family, name))


def extents(family: Family, name: str, shape: Shape) -> tuple[int | None, ...]:
    """How long each axis of a tensor must be before the cut; None where the table does not say it."""
    whole = Kept(layers=())
    return tuple(_axis(axis, shape, whole, *place_of(name))[0] for axis in axes_of(family, name))


def place_of(name: str) -> tuple[int, int | None]:
    """The layer and the expert that a tensor's name tells; layer -1 outside the layers."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0] if numbers else -1), (numbers[1] if len(numbers) > 1 else None)


def axes_of(family: Family, name: str) -> tuple[str, ...]:
    """What the table says that a tensor's axes count; nothing where it stays as it is. raises: Mismatch"""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    if family.aside & {*parts}:
        return ()
    module = parts[:-1] if parts[-1] in ("weight", "bias") else parts
    for known in (parts, module):
        for start in range(len(known)):
            if row := family.rows.get(".".join(known[start:])):
                axes = () if row == "-" else tuple(row.split())
                is_bias = known is module and parts[-1] == "bias"
                return (axes[-1:] if family.transposed else axes[:1]) if is_bias else axes
    raise Mismatch(f"tensor '{name}' is not in the table of its family, so its widths cannot be cut, only whole layers")


def _axis(axis: str, shape: Shape, kept: Kept, layer: int, expert: int | None) -> tuple[int | None, Numbers | None]:
    """How long an axis is, and what stays along it; it is one part, or several one after the other."""
    parts = [_part(part, shape, kept, layer, expert) for part in axis.split("+")]
    if len(parts) == 1:
        return parts[0]
    stays: list[int] = []
    end = 0
    for size, stay in parts:
        stays += (end + number for number in (range(size or 0) if stay is None else stay))
        end += size or 0
    return end, None if len(stays) == end else tuple(stays)


def _part(part: str, shape: Shape, kept: Kept, layer: int, expert: int | None) -> tuple[int | None, Numbers | None]:
    match part:
        case "hidden":
            return shape.hidden, kept.hidden
        case "ffn":
            return shape.ffn, kept.ffn.get(layer)
        case "heads":
            return shape.heads * shape.head_dim, _channels(kept_heads(kept, shape, layer)[0], shape.head_dim)
        case "kv":
            return shape.kv_heads * shape.head_dim, _channels(kept_heads(kept, shape, layer)[1], shape.head_dim)
        case "experts":
            return shape.experts, kept.experts.get(layer)
        case "expert_ffn":
            return shape.expert_ffn, None if expert is None else kept.expert_ffn.get((layer, expert))
    return None, None


def _channels(heads: Numbers | None, head_dim: int) -> Numbers | None:
    return None if heads is None else tuple(head * head_dim + i for head in heads for i in range(head_dim))
