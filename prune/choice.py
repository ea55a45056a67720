"""Which layers, heads, channels and experts stay: by importance, or the first of each where only sizes matter."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from wtool.checkpoint import Checkpoint
from wtool.errors import UsageError
from wtool.layer_rules import depth_key, text_config
from wtool.linear_names import linear_layers

from .candidate import Candidate
from .cut import cut
from .families import family_of
from .latency import weights_of_a_token
from .recipe import BUDGETS, PruneRecipe
from .structure import Kept, Shape, axes_of, place_of, shape_of

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows

    from .depth import Losses
    from .importance import Importance

WIDTHS = ("hidden", "ffn", "heads", "kv_heads", "experts", "expert_ffn")
NO_BUDGET: dict[str, Any] = dict.fromkeys(BUDGETS)
TOKENS = 4096  # that losses without some layers are measured on
TOGETHER = 8  # rows of 16 bytes, which torch's grouped product of experts demands
Start = Callable[[str, int], Callable[[int], None]]
Choose = Callable[[str, Any, int, int], tuple[int, ...]]  # of what, where, of how many, how many


def _depth(recipe: PruneRecipe, source: Checkpoint) -> tuple[int, int]:
    """How many layers there are, and how many stay."""
    text = text_config(source.config)
    depth = text[depth_key(text)]
    keep = depth if recipe.layers is None else recipe.layers if isinstance(recipe.layers, int) else len(recipe.layers)
    if not 1 <= keep <= depth:
        raise UsageError(f"{source.label}: has {depth} layers, of which {keep} cannot be kept; 1 to {depth} can")
    return depth, keep


def first(recipe: PruneRecipe, source: Checkpoint) -> Kept:
    """The first of everything."""
    _, keep = _depth(recipe, source)
    layers = tuple(range(keep)) if recipe.layers is None or isinstance(recipe.layers, int) else recipe.layers
    if not any(getattr(recipe, name) is not None for name in WIDTHS):
        return Kept(layers)
    shape = shape_of(source.config)

    def choose(what: str, place: Any, size: int, keep: int) -> tuple[int, ...]:
        return _first_heads(shape, keep) if what == "heads" else tuple(range(keep))

    return _with_widths(recipe, source, layers, choose)


def _first_heads(shape: Shape, keep: int) -> tuple[int, ...]:
    """As many query heads of every key-value head; where each has its own, these go together."""
    group = shape.heads // shape.kv_heads
    return (
        tuple(range(keep))
        if group == 1
        else tuple(head for head in range(shape.heads) if head % group < keep // shape.kv_heads)
    )


def _with_widths(recipe: PruneRecipe, source: Checkpoint, layers: tuple[int, ...], choose: Choose) -> Kept:
    """What stays of the widths, as some function chooses it."""
    shape = shape_of(source.config)
    for name in WIDTHS:
        _check_size(source, recipe, shape, name)
    sparse = [layer for layer in layers if layer not in shape.dense]
    dense = [layer for layer in layers if layer in shape.dense]

    def some(name: str, places: list[Any]) -> dict[Any, tuple[int, ...]]:
        keep, size = getattr(recipe, name), getattr(shape, name)
        return {} if keep is None or keep == size else {place: choose(name, place, size, keep) for place in places}

    experts = some("experts", sparse)
    inside = [(layer, expert) for layer in sparse for expert in experts.get(layer, range(shape.experts or 0))]
    kv = some("kv_heads", list(layers))
    queries = {} if kv else some("heads", list(layers))
    hidden = some("hidden", [None]).get(None)
    return Kept(
        layers,
        hidden=hidden,
        ffn=some("ffn", dense),
        heads=queries,
        kv_heads=kv,
        experts=experts,
        expert_ffn=some("expert_ffn", inside),
    )


def _check_size(source: Checkpoint, recipe: PruneRecipe, shape: Shape, name: str) -> None:
    keep, size = getattr(recipe, name), getattr(shape, name)
    if keep is None:
        return
    if size is None:
        raise UsageError(f"{source.label}: a {source.config.get('model_type')} has no {name}")
    if keep > size:
        raise UsageError(f"{source.label}: has {name} {size}, of which {keep} cannot be kept")
    if name == "ffn" and not shape.dense:
        raise UsageError(f"{source.label}: all its feed-forward blocks are of experts; their channels are --expert-ffn")
    if name in ("hidden", "expert_ffn") and shape.experts and keep % TOGETHER:
        raise UsageError(
            f"{source.label}: transformers multiplies experts by {TOGETHER} channels; {name} {keep} is no multiple"
        )
    if name == "heads":
        _check_heads(source, shape, keep, recipe.kv_heads)


def _check_heads(source: Checkpoint, shape: Shape, keep: int, kv_heads: int | None) -> None:
    each = shape.heads // shape.kv_heads
    if kv_heads in (None, shape.kv_heads) and each > 1 and keep % shape.kv_heads:
        raise UsageError(
            f"{source.label}: {keep} heads cannot be shared out evenly over {shape.kv_heads} key-value heads; "
            f"take a multiple of {shape.kv_heads}, or --kv-heads"
        )
    if kv_heads not in (None, shape.kv_heads) and keep != kv_heads * each:
        raise UsageError(f"{source.label}: key-value heads go with their {each} query heads each; leave out --heads")


def by_importance(
    recipe: PruneRecipe,
    source: Checkpoint,
    found: "Importance | None",
    windows: "Windows | None",
    where: "Where",
    start: Start,
) -> Kept:
    """What stays, by importance.

    windows: None where the recipe names the layers, or where the last ones go
    """
    layers = _layers(recipe, source, found, windows, where, start)
    if found is None or not any(getattr(recipe, name) is not None for name in WIDTHS):
        return Kept(layers)
    import torch

    from . import width

    shape, importance = shape_of(source.config), found
    fed = _by_input(source)

    def choose(what: str, place: Any, size: int, keep: int) -> tuple[int, ...]:
        if what == "hidden" and recipe.rotate:
            return tuple(range(keep))  # the principal directions come first
        if what == "hidden":
            return width.hidden((importance.energies[name] for name in fed["hidden"].get(None, [])), keep)
        if what == "experts":
            scores = importance.strengths if recipe.expert_score == "reap" else importance.visits
            return width.highest(scores[place], keep)
        energies = [importance.energies[name] for name in fed["heads" if "heads" in what else what][place]]
        energy = torch.stack(energies).sum(0)
        if what == "heads" and shape.heads > shape.kv_heads:
            return width.heads(energy, size, shape.kv_heads, keep)
        return width.key_value_heads(energy, size, keep) if "heads" in what else width.highest(energy, keep)

    return _with_widths(recipe, source, layers, choose)


def _by_input(source: Checkpoint) -> dict[str, dict[Any, list[str]]]:
    """The linears by what their inputs are, and where: a layer, an expert of one, or the whole model."""
    family = family_of(source.config)
    found: dict[str, dict[Any, list[str]]] = {}
    for name in linear_layers(source)[0]:
        axes = axes_of(family, name)
        what = axes[0 if family.transposed else -1]
        layer, expert = place_of(name)
        place = None if what == "hidden" else (layer, expert) if what == "expert_ffn" else layer
        found.setdefault(what, {}).setdefault(place, []).append(name)
    return found


def _layers(
    recipe: PruneRecipe,
    source: Checkpoint,
    found: "Importance | None",
    windows: "Windows | None",
    where: "Where",
    start: Start,
) -> tuple[int, ...]:
    from . import depth

    if isinstance(recipe.layers, tuple):
        return recipe.layers
    count, keep = _depth(recipe, source)
    if keep == count:
        return tuple(range(count))
    if recipe.depth_score == "last":
        return depth.before_last(count, keep)
    if recipe.depth_score == "perplexity":
        assert windows is not None
        return _by_loss(source, count, keep, windows, where, start)
    assert found is not None
    if recipe.depth_score == "angular":
        return depth.by_angle(found.ends, keep)
    return depth.by_influence(found.influences, keep)


def _by_loss(
    source: Checkpoint, count: int, keep: int, windows: "Windows", where: "Where", start: Start
) -> tuple[int, ...]:
    from .depth import by_loss

    return by_loss(losses_of(source, windows, where, start), count, keep)


def losses_of(source: Checkpoint, windows: "Windows", where: "Where", start: Start) -> "Losses":
    """The function that measures the losses of a checkpoint without some of its layers, on some of the text."""
    from wtool import calibrate
    from wtool.ablation import losses

    network = calibrate.network(source, where)
    tokens = windows.unpadded()
    some = tokens[: max(1, TOKENS // len(tokens[0]))]
    return lambda lacks: losses(network, some, lacks, where=where, start=lambda steps: start("trying cuts", steps))


def searched(
    recipe: PruneRecipe,
    source: Checkpoint,
    found: "Importance",
    windows: "Windows",
    where: "Where",
    start: Start,
) -> PruneRecipe:
    """The recipe with the sizes that were found for its budget.

    raises: UsageError where there are none
    """
    from . import search
    from .depth import removals

    shape, budget = shape_of(source.config), _budget(recipe, source)
    inner = "experts" if shape.experts and len(shape.dense) < shape.layers else "ffn"
    whole = search.Sizes(shape.layers, getattr(shape, inner), shape.kv_heads)
    most = shape.layers - search.depths(shape.layers)[-1]
    order = removals(losses_of(source, windows, where, start), shape.layers, most)

    def sized(sizes: search.Sizes) -> PruneRecipe:
        gone = {layer for layer, _ in order[: shape.layers - sizes.layers]}
        layers = tuple(layer for layer in range(shape.layers) if layer not in gone)
        kv = None if sizes.kv_heads == shape.kv_heads else sizes.kv_heads
        return recipe.model_copy(update=NO_BUDGET | {"layers": layers, inner: sizes.inner, "kv_heads": kv})

    def loss(sizes: search.Sizes) -> float:
        kept = by_importance(sized(sizes), source, found, windows, where, start)
        return losses_of(Candidate(source, kept), windows, where, start)([()])[0]

    def count(sizes: search.Sizes) -> int:
        small = sized(sizes).model_copy(update={"layers": tuple(range(sizes.layers))})
        return budget.count(Candidate(source, first(small, source)))

    base = loss(whole)
    costs = search.Costs(
        {shape.layers: 0.0, **{shape.layers - i: value - base for i, (_, value) in enumerate(order, 1)}},
        {size: loss(replace(whole, inner=size)) - base for size in search.widths(whole.inner, shape.top_k or 1)},
        {size: loss(replace(whole, kv_heads=size)) - base for size in _fitting_heads(source, recipe, shape)},
    )
    least = search.Sizes(1, min(costs.inner), min(costs.kv_heads))
    counted = search.parameter_count(count, whole, least)
    return sized(search.best(costs, counted, budget.most, loss, unit=budget.unit))


@dataclass(frozen=True)
class _Budget:
    count: Callable[[Checkpoint], int]
    most: int
    unit: str


def _budget(recipe: PruneRecipe, source: Checkpoint) -> _Budget:
    """What is counted, and how much of it there may be."""
    if recipe.params is not None:
        return _Budget(lambda candidate: candidate.parameters, recipe.params, "parameters")
    if recipe.size is not None:
        return _Budget(lambda candidate: candidate.nbytes, recipe.size, "bytes")
    assert recipe.latency_ratio is not None
    most = int(recipe.latency_ratio * weights_of_a_token(source))
    return _Budget(weights_of_a_token, most, "weights of a token")


def _fitting_heads(source: Checkpoint, recipe: PruneRecipe, shape: Shape) -> list[int]:
    """Numbers of key-value heads that the family can express."""
    found: list[int] = []
    for size in (shape.kv_heads, shape.kv_heads - 1, shape.kv_heads - 2):
        try:
            if size > 0:
                cut(source, first(recipe.model_copy(update=NO_BUDGET | {"kv_heads": size}), source))
                found.append(size)
        except UsageError:
            continue
    return found
