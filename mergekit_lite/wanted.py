"""Which tensors the output has, and what each is made of: of a list of models, of slices, or of modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wtool.checkpoint import Checkpoint
from wtool.errors import UsageError

from .output_config import depth_in, with_stack
from .parameters import Depths
from .places import ModelEntry, Module, OutputSlice
from .recipe import MergeRecipe
from .roles import Entry, Mix, mix
from .slices import (
    Settings,
    Stack,
    check_ranges,
    layers_wanted,
    outside_mixes,
    outside_wanted,
    slice_mixes,
    taken,
)
from .steps import Wanted
from .towers import WHOLE, find_tower, stacks, text_tower, towers

Checkpoints = Mapping[str, Checkpoint]


@dataclass(frozen=True)
class Layout:
    """The output's tensors, in their order on disk, and the donor's config.json with as many layers as they have."""

    tensors: Sequence[Wanted]
    config: Mapping[str, Any]
    problems: Sequence[str] = field(default=())
    remarks: Sequence[str] = field(default=())


def wanted(recipe: MergeRecipe, checkpoints: Checkpoints, names: Sequence[str]) -> Layout:
    """What a recipe asks for.

    checkpoints: by their references, the donor of the configuration first
    names:       all tensors the output may have, by the names they have in the models
    raises: UsageError
    """
    config = next(iter(checkpoints.values())).config
    if recipe.slices:
        found = stacks(names)
        if len(found) != 1:
            raise UsageError(
                f"slices: the checkpoint has {len(found)} stacks of layers ({', '.join(found)}); "
                f"say with modules what each tower is made of ({', '.join(towers(names))})"
            )
        return _of_slices(recipe, recipe.slices, [recipe.parameters], checkpoints, {WHOLE: names}, WHOLE)
    if recipe.modules:
        return _of_modules(recipe, recipe.modules, checkpoints, towers(names))
    return Layout(_of_models(recipe, recipe.models, [recipe.parameters], names), config)


def _of_models(
    recipe: MergeRecipe, models: Sequence[ModelEntry], shared: Settings, names: Sequence[str]
) -> list[Wanted]:
    entries = [Entry(entry.model, entry.parameters) for entry in models]
    own = mix(recipe.merge_method, recipe.base_model, entries, shared)
    depths = Depths(names)
    return [Wanted(name, own, (name,) * len(own.inputs), depths.of(name)) for name in names]


def _of_slices(
    recipe: MergeRecipe,
    slices: Sequence[OutputSlice],
    shared: Settings,
    checkpoints: Checkpoints,
    groups: Mapping[str, Sequence[str]],
    tower: str,
) -> Layout:
    """A tower's layers, stacked."""
    names = groups[tower]
    donor, source = next(iter(checkpoints.items()))
    if not stacks(names):
        raise UsageError(f"slices: the module '{tower}' has no layers; give it models")
    part = _part_of(source.config, groups, tower)
    stack = _stack(checkpoints, names, part)
    check_ranges(slices, stack)
    method, base = recipe.merge_method, recipe.base_model
    mixes = slice_mixes(method, base, slices, shared)
    before, after, remarks = outside_mixes(method, base, slices, shared)
    first, last = outside_wanted(stack, before, after, names, sum(each.depth for each in slices))
    layers = layers_wanted(slices, mixes, stack)
    try:
        config, problems = with_stack(source.config, taken(mixes, slices, donor), part), []
    except UsageError as error:
        config, problems = source.config, [str(error)]
    return Layout([*first, *layers, *last], config, problems, remarks)


def _stack(checkpoints: Checkpoints, names: Sequence[str], part: str | None) -> Stack:
    """The stack of layers among a tower's names."""
    [(prefix, counted)] = stacks(names).items()
    own = set(names)
    tensors = {model: [name for name in source.tensors if name in own] for model, source in checkpoints.items()}
    depths = {model: depth_in(source.config, part) or counted for model, source in checkpoints.items()}
    held = {model: stacks(tensors[model]).get(prefix, 0) for model in checkpoints}
    return Stack(prefix, tensors, {model: min(depths[model], held[model]) for model in checkpoints})


def _of_modules(
    recipe: MergeRecipe, modules: Mapping[str, Module], checkpoints: Checkpoints, groups: Mapping[str, Sequence[str]]
) -> Layout:
    """Each tower made as the recipe tells, the others those of the donor."""
    donor, source = next(iter(checkpoints.items()))
    asked = _asked(modules, groups)
    config, problems, remarks = source.config, [], []
    changed: dict[str, Any] = {}
    tensors: dict[str, list[Wanted]] = {}
    for tower, module in asked.items():
        shared = [module.parameters, recipe.parameters]
        if module.slices:
            made = _of_slices(recipe, module.slices, shared, checkpoints, groups, tower)
            tensors[tower] = list(made.tensors)
            part = _part_of(config, groups, tower)
            changed |= {} if part is None else {part: made.config[part]}
            config = {**(made.config if part is None else config), **changed}
            problems += [f"module {tower}: {problem}" for problem in made.problems]
            remarks += [f"module {tower}: {remark}" for remark in made.remarks]
        else:
            tensors[tower] = _of_models(recipe, module.models, shared, groups[tower])
    if copied := [tower for tower in groups if tower not in asked]:
        remarks.append(f"{', '.join(copied)}: of {donor} as they are, for the recipe's modules do not name them")
    alone = Mix("passthrough", None, (Entry(donor),), ())
    for tower in copied:
        tensors[tower] = [Wanted(name, alone, (name,), 0.0) for name in groups[tower] if name in source.tensors]
    return Layout([each for tower in groups for each in tensors[tower]], config, problems, remarks)


def _asked(modules: Mapping[str, Module], groups: Mapping[str, Sequence[str]]) -> dict[str, Module]:
    """The recipe's modules by the checkpoint's towers; `default` is those that have no other name.

    raises: UsageError
    """
    names: dict[str, str] = {}
    rest = WHOLE if WHOLE in modules and WHOLE not in groups else None
    for name in modules:
        if name == rest:
            continue
        tower = find_tower(name, groups)
        if tower in names:
            raise UsageError(f"modules: '{names[tower]}' and '{name}' are both the module '{tower}'")
        names[tower] = name
    if rest and modules[rest].slices:
        raise UsageError(f"modules: '{rest}' is what the other modules are not, and has no layers; give it models")
    if rest:
        names = {tower: names.get(tower, rest) for tower in groups}
    return {tower: modules[names[tower]] for tower in groups if tower in names}


def _part_of(config: Mapping[str, Any], groups: Mapping[str, Sequence[str]], tower: str) -> str | None:
    """The key of the configuration that is about a tower; None for the language model's.

    raises: UsageError where none is known to be
    """
    if len(groups) == 1 or tower == text_tower(groups):
        return None
    parts = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    for key in parts:
        if key.removesuffix("_config") in tower or (key == "vision_config" and "visual" in tower):
            return key
    raise UsageError(f"modules: slices of '{tower}': config.json has no part about it (it has {', '.join(parts)})")
