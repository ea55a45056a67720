"""From a recipe that asks for an average of bits, or a size, to one that tells the grid of every layer."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wtool.console import parse_size
from wtool.dtypes import torch_dtype
from wtool.errors import UsageError
from wtool.formats import Scheme
from wtool.formats.scheme import EXPERTS
from wtool.grid import BITS, Grid
from wtool.linear_names import LAYER
from wtool.recipe_parts import fits
from wtool.statistics_folder import Input, Statistics

from .allocate import Allocation, allocate, smallest
from .gptq import Settings
from .planner import Layer, QuantPlan, plan_quantize
from .recipe import METHODS, QuantRecipe
from .sensitivity import CLIP, losses
from .targets import FUSED
from .targets import problems as target_problems

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Settled:
    """What came of it."""

    recipe: QuantRecipe  # with a grid for every layer, as overrides
    about: Mapping[str, Any]  # for the manifest (JSON)


@dataclass(frozen=True)
class Question:
    """What is to be decided."""

    layers: Sequence[Layer]  # that are free
    grids: Sequence[Grid]
    sizes: Sequence[Sequence[int]]  # [layers][grids], bytes
    losses: Sequence[Sequence[float]]  # the same, infinite where a layer cannot have a grid
    groups: Sequence[Sequence[int]]  # of layers that must be alike
    weighted: bool  # losses are in nats per token, as gradients were gathered


def uniform(recipe: QuantRecipe) -> QuantRecipe:
    """The recipe with one grid, which the target need not take, in the place of a choice: all else is planned by it."""
    bits = 4 if recipe.target_size is not None else max(bits for bits in BITS if bits <= recipe.bits)
    return recipe.model_copy(update={"bits": bits, "target_size": None, "candidates": (), "target": None})


def grids_of(recipe: QuantRecipe) -> list[Grid]:
    """The grids that layers may get.

    raises: UsageError
    """
    found: list[Grid] = []
    for text in recipe.candidates or tuple(map(str, BITS)):
        bits, _, size = text.partition("/")
        if not bits.isdigit() or int(bits) not in BITS or (size and not re.fullmatch(r"-1|[1-9]\d*", size)):
            raise UsageError(f"candidate '{text}': write bits ({', '.join(map(str, BITS))}), or bits/group as 4/32")
        found.append(Grid(int(bits), int(size or recipe.group_size), recipe.symmetric))
    return list(dict.fromkeys(found))


def settle(
    recipe: QuantRecipe,
    base: QuantPlan,
    statistics: Statistics,
    *,
    max_shard_bytes: int,
    progress: Progress = lambda steps: None,
) -> Settled:
    """Give every layer the grid that serves the budget best.

    base: the plan of `uniform(recipe)`
    progress: is told of each layer that was measured

    raises: UsageError where the budget is too small for any choice
    """
    question = _question(recipe, base, statistics, progress)
    limit = None if recipe.target_size is None else parse_size(recipe.target_size)
    taken = sum(layer_bytes(layer, layer.scheme.grid) for layer in question.layers)
    budget = _average(recipe, question.layers) if limit is None else limit - base.plan.bytes_to_write + taken
    least = smallest(question.sizes, question.losses, question.groups)
    while True:
        found = allocate(question.sizes, question.losses, question.groups, max(budget, least))
        settled = _settled(recipe, question, found)
        written = 0 if limit is None else _bytes_to_write(settled, max_shard_bytes)
        if budget < least:
            rest = base.plan.bytes_to_write - taken
            raise _too_small(recipe, least + rest if limit is None else written)
        if limit is None or written <= limit:
            return Settled(settled, _about(recipe, question, found, budget))
        budget -= written - limit  # headers have more digits where sizes do


def layer_bytes(layer: Layer, grid: Grid) -> int:
    """What a layer takes on disk on a grid, without headers."""
    outputs = replace(layer, scheme=Scheme(grid, layer.scheme.ordered)).outputs
    return sum(info.nbytes for info in outputs.values())


def _question(recipe: QuantRecipe, base: QuantPlan, statistics: Statistics, progress: Progress) -> Question:
    free = [
        layer
        for name, layer in base.layers.items()
        if name in statistics.inputs and not any(fits(each.filter, layer.linear.module) for each in recipe.overrides)
    ]
    if not free:
        raise UsageError(f"{base.plan.sources[0].label}: no layer is left whose bits could be chosen")
    grids, groups = grids_of(recipe), _groups(recipe, free)
    measured: list[list[float]] = []
    barred = _barred(recipe, free, groups, grids)
    for number, layer in enumerate(free):
        measured.append(_losses(recipe, base, layer, grids, statistics, barred[number]))
        progress(1)
    sizes = [[layer_bytes(layer, grid) for grid in grids] for layer in free]
    weighted = all(statistics.squared_gradients(layer.linear.tensor) is not None for layer in free)
    return Question(free, grids, sizes, measured, groups, weighted)


def _losses(
    recipe: QuantRecipe,
    base: QuantPlan,
    layer: Layer,
    grids: Sequence[Grid],
    statistics: Statistics,
    barred: Sequence[bool],
) -> list[float]:
    """The loss of each grid that is not barred, infinite for those that are; a layer counts by its share of tokens."""
    met, tensor = statistics.inputs[layer.linear.tensor], layer.linear.tensor
    stored = base.plan.sources[0].read(tensor)
    found = losses(
        stored.T if layer.linear.transposed else stored,
        statistics.matrices.read(met.linears[0]),
        [grid for grid, is_barred in zip(grids, barred, strict=True) if not is_barred],
        settings=Settings(
            torch_dtype(layer.scale_dtype),
            damping=recipe.damping,
            act_order=recipe.act_order,
            static_groups=recipe.static_groups,
            clip=CLIP if recipe.clip else None,
        ),
        compensating=METHODS[recipe.method].compensating,
        importance=statistics.squared_gradients(tensor),
    )
    base.plan.sources[0].forget(tensor)
    values, share = iter(found), met.tokens / _tokens(statistics.inputs)
    return [float("inf") if is_barred else next(values) * share for is_barred in barred]


def _tokens(inputs: Mapping[str, Input]) -> int:
    return max(1, max(each.tokens for each in inputs.values()))


def _groups(recipe: QuantRecipe, layers: Sequence[Layer]) -> list[list[int]]:
    """Layers that are decoded or computed as one, where all of them are free; any other alone.

    For vLLM these are the experts of a block, and what it fuses; for transformers, and unless told, all experts.
    """
    number = {layer.linear.module: i for i, layer in enumerate(layers)}
    for_vllm = recipe.target == "vllm"
    experts: dict[str, list[int]] = {}
    for module, i in number.items():
        if block := EXPERTS.match(module):
            experts.setdefault(block[1] if for_vllm else "", []).append(i)
    together = list(experts.values())
    for module in number if for_vllm else ():
        parent, _, own = module.rpartition(".")
        for names in FUSED:
            members = [f"{parent}.{name}" for name in names]
            if own == names[0] and not EXPERTS.match(module) and all(member in number for member in members):
                together.append([number[member] for member in members])
    taken = {i for group in together for i in group}
    return together + [[i] for i in range(len(layers)) if i not in taken]


def _barred(
    recipe: QuantRecipe, layers: Sequence[Layer], groups: Sequence[Sequence[int]], grids: Sequence[Grid]
) -> list[list[bool]]:
    """For each layer, which grids the format or the target does not take.

    raises: UsageError where a layer is left without any
    """
    barred = [[False] * len(grids) for _ in layers]
    for group in groups:
        problems: list[str] = []
        for j, grid in enumerate(grids):
            asked = {layers[i].linear.module: replace(layers[i], scheme=Scheme(grid)) for i in group}
            unfit = [layer.format.unfit(layer.linear.shape, layer.scheme) for layer in asked.values()]
            against = [reason for reason in unfit if reason] + target_problems(recipe, asked)
            for i in group:
                barred[i][j] = bool(against)
            problems += against[:1]
        if len(problems) == len(grids):
            raise UsageError(f"no candidate for '{layers[group[0]].linear.module}': {problems[0]}")
    return barred


def _average(recipe: QuantRecipe, layers: Sequence[Layer]) -> int:
    """The bytes of an average of bits: between those of the two nearest grids, by its distance to each."""
    low, high = max(b for b in BITS if b <= recipe.bits), min(b for b in BITS if b >= recipe.bits)
    share = 0.0 if low == high else (recipe.bits - low) / (high - low)
    sizes = [
        sum(layer_bytes(layer, Grid(bits, recipe.group_size, recipe.symmetric)) for layer in layers)
        for bits in (low, high)
    ]
    return int(sizes[0] + share * (sizes[1] - sizes[0]))


def _too_small(recipe: QuantRecipe, least: int) -> UsageError:
    """The error for a budget that nothing fits; `least` bytes are the smallest output."""
    asked = f"bits {recipe.bits}" if recipe.target_size is None else f"target size {recipe.target_size}"
    return UsageError(f"{asked}: too small; the smallest that the candidates allow is {least:,} bytes")


def _settled(recipe: QuantRecipe, question: Question, found: Allocation) -> QuantRecipe:
    """The recipe with the grid of most layers as its own, and overrides for all others."""
    chosen = {layer.linear.module: question.grids[j] for layer, j in zip(question.layers, found.choices, strict=True)}
    common = Counter(chosen.values()).most_common(1)[0][0]
    others = {module: grid for module, grid in chosen.items() if grid != common}
    told = recipe.model_dump(exclude_unset=True, exclude={"target_size", "candidates"})
    told |= {"bits": common.bits, "group_size": common.group_size}
    told["overrides"] = [*(each.model_dump(exclude_none=True) for each in recipe.overrides), *overrides(others)]
    return QuantRecipe.model_validate(told)


def overrides(grids: Mapping[str, Grid]) -> list[dict[str, Any]]:
    """Overrides that give each of some modules its grid, one for each kind of module and grid."""
    numbers: dict[tuple[str, Grid], dict[tuple[str, str], list[str]]] = {}
    for module, grid in grids.items():
        match = LAYER.match(module)
        assert match is not None, "linears stand in numbered layers"
        prefix, number, rest = match[1], match[2], module[match.end() :]
        numbers.setdefault((rest.rpartition(".")[2], grid), {}).setdefault((prefix, rest), []).append(number)
    found = []
    for (_, grid), places in sorted(numbers.items(), key=lambda each: (each[0][0], each[0][1].bits)):
        parts = [
            f"{re.escape(prefix)}{_any_of(layers)}\\.{re.escape(rest)}" for (prefix, rest), layers in places.items()
        ]
        found.append({"filter": f"re:^{_any_of(parts)}$", "bits": grid.bits, "group_size": grid.group_size})
    return found


def _any_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _bytes_to_write(recipe: QuantRecipe, max_shard_bytes: int) -> int:
    return plan_quantize(recipe, headers_only=True, max_shard_bytes=max_shard_bytes).plan.bytes_to_write


def _about(recipe: QuantRecipe, question: Question, found: Allocation, budget: int) -> dict[str, Any]:
    grids = [question.grids[j] for j in found.choices]
    return {
        "asked": {"bits": recipe.bits} if recipe.target_size is None else {"target_size": recipe.target_size},
        "candidates": [f"{grid.bits}/{grid.group_size}" for grid in question.grids],
        "weighted": question.weighted,
        "predicted_loss": float(f"{found.loss:.6g}"),
        "gap": float(f"{found.gap:.3g}"),
        "budget_bytes": budget,
        "bytes": found.size,
        "layers": {
            layer.linear.module: {"bits": grid.bits, "group_size": grid.group_size}
            for layer, grid in zip(question.layers, grids, strict=True)
        },
    }
