"""Layers stacked from slices: which layer of which model stands behind each tensor of the output.

What stands outside of the layers is of all slices. What comes before them (embeddings) is settled by the first slice,
at the first value of a gradient; what comes after (final norm, head) by the last slice, at the last value.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from wtool.errors import UsageError
from wtool.linear_names import LAYER

from .parameters import is_after_layers
from .places import OutputSlice, Setting
from .roles import Entry, Mix, mix, takes
from .steps import Wanted

Settings = Sequence[Mapping[str, Setting]]


@dataclass(frozen=True)
class Stack:
    """The stack of layers that slices are cut from."""

    prefix: str  # what comes before a layer's number in its tensors' names
    names: Mapping[str, Collection[str]]  # the tensors of each model, in their order on disk
    depths: Mapping[str, int]  # layers of each model; what is numbered beyond them is for multi-token prediction

    def of(self, model: str, layer: int) -> list[str]:
        """What follows the number in the names of a layer's tensors."""
        start = f"{self.prefix}{layer}."
        return [name[len(start) - 1 :] for name in self.names[model] if name.startswith(start)]


def check_ranges(slices: Sequence[OutputSlice], stack: Stack) -> None:
    """Refuse layers that a model does not have. raises: UsageError"""
    for number, each in enumerate(slices):
        for source in each.sources:
            depth = stack.depths[source.model]
            if source.layer_range[1] > depth:
                raise UsageError(
                    f"slice {number}: layer_range {list(source.layer_range)} of {source.model} goes beyond its "
                    f"{depth} layers (0 to {depth - 1})"
                )


def slice_mixes(method: str, base: str | None, slices: Sequence[OutputSlice], shared: Settings) -> list[Mix]:
    """How the layers of each slice are made.

    shared: parameters for all models that stand outside of the slices
    raises: UsageError
    """
    mixes = []
    for number, each in enumerate(slices):
        entries = [Entry(source.model, source.parameters, source.layer_range[0]) for source in each.sources]
        try:
            mixes.append(mix(method, each.base_model or base, entries, [each.parameters, *shared]))
        except UsageError as error:
            raise UsageError(f"slice {number}: {error}") from None
    return mixes


def outside_mixes(
    method: str, base: str | None, slices: Sequence[OutputSlice], shared: Settings
) -> tuple[Mix, Mix, list[str]]:
    """How what comes before the layers is made, and what comes after; and remarks."""
    remarks: list[str] = []
    found = []
    for order, part in ((slices, "before"), (slices[::-1], "after")):
        own = order[0]
        entries = _distinct(order)
        if not takes(method, own.base_model or base, entries):
            kept = _distinct(order[:1])
            if len(kept) < len(entries):
                told = " and ".join(entry.model for entry in kept)
                end = "first" if part == "before" else "last"
                remarks.append(
                    f"what comes {part} the layers is of {told}, which the {end} slice names: {method} does not take "
                    f"all {len(entries)} models of the slices"
                )
            entries = kept
        if len(entries) == 1 and not takes(method, own.base_model or base, entries):
            found.append(Mix("passthrough", None, (replace(entries[0], parameters={}),), ()))
        else:
            found.append(mix(method, own.base_model or base, entries, [own.parameters, *shared]))
    return found[0], found[1], remarks


def _distinct(slices: Sequence[OutputSlice]) -> list[Entry]:
    """Every model once, with the parameters of the first source that has it."""
    entries: dict[str, Entry] = {}
    for each in slices:
        for source in each.sources:
            entries.setdefault(source.model, Entry(source.model, source.parameters))
    return list(entries.values())


def layers_wanted(slices: Sequence[OutputSlice], mixes: Sequence[Mix], stack: Stack) -> list[Wanted]:
    """The tensors of the output's layers, in their order."""
    wanted = []
    number = 0
    for each, own in zip(slices, mixes, strict=True):
        for offset in range(each.depth):
            depth = offset / (each.depth - 1) if each.depth > 1 else 1.0
            rests = dict.fromkeys(r for entry in own.inputs for r in stack.of(entry.model, entry.first + offset))
            for rest in rests:
                names = tuple(f"{stack.prefix}{entry.first + offset}{rest}" for entry in own.inputs)
                wanted.append(Wanted(f"{stack.prefix}{number}{rest}", own, names, depth))
            number += 1
    return wanted


def outside_wanted(
    stack: Stack, before: Mix, after: Mix, names: Collection[str], depth: int
) -> tuple[list[Wanted], list[Wanted]]:
    """The tensors outside of the layers: (those before, those after).

    names: all tensors that the output may have, by the names they have in the models
    depth: layers of the output
    """
    first: list[Wanted] = []
    last: list[Wanted] = []
    beyond: dict[tuple[int, str], None] = {}
    for name in names:
        match = LAYER.match(name)
        if match and match[1] == stack.prefix:
            beyond |= {(int(match[2]) - own, name[match.end(2) :]): None for own in _beyond(stack, name, int(match[2]))}
        elif is_after_layers(name):
            last.append(Wanted(name, after, (name,) * len(after.inputs), 1.0))
        else:
            first.append(Wanted(name, before, (name,) * len(before.inputs), 0.0))
    for extra, rest in beyond:
        origins = tuple(f"{stack.prefix}{stack.depths[entry.model] + extra}{rest}" for entry in after.inputs)
        last.append(Wanted(f"{stack.prefix}{depth + extra}{rest}", after, origins, 1.0))
    return first, last


def _beyond(stack: Stack, name: str, layer: int) -> set[int]:
    """The depths of the models in which a tensor of a layer comes after the last layer."""
    return {depth for model, depth in stack.depths.items() if layer >= depth and name in stack.names[model]}


def taken(mixes: Sequence[Mix], slices: Sequence[OutputSlice], donor: str) -> list[int]:
    """Of each layer of the output, its number in the donor, or in the first model where the donor has no part."""
    numbers: list[int] = []
    for each, own in zip(slices, mixes, strict=True):
        entry = next((entry for entry in own.inputs if entry.model == donor), own.inputs[0])
        numbers += range(entry.first, entry.first + each.depth)
    return numbers
