"""Several merges in one file: documents with names, whose results later documents name as models.

All are planned before the first is run, each on sketches of those it needs. What a stage makes lies in a folder beside
the output until the output is whole.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from wtool import __version__
from wtool.errors import UsageError
from wtool.plan import Plan
from wtool.recipe_file import read_yaml

from .card import model_card
from .planner import plan_merge
from .recipe import MergeRecipe, parse_recipe


@dataclass(frozen=True)
class Stages:
    """Merges by their names, in an order in which they can be made, and the one that makes the output."""

    before: Mapping[str, MergeRecipe]
    output: MergeRecipe


def documents(path: Path) -> list[Any]:
    """The documents of a YAML file.

    raises: UsageError
    """
    try:
        found = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, ValueError):
        return [read_yaml(path)]  # which says what is wrong
    return [content for content in found if content is not None]


def read_stages(path: Path) -> Stages | None:
    """The stages of a recipe file; None where it has one document without a name.

    raises: UsageError
    """
    contents = documents(path)
    if len(contents) < 2 and not (contents and isinstance(contents[0], dict) and "name" in contents[0]):
        return None
    named: dict[str | None, MergeRecipe] = {}
    for number, content in enumerate(contents):
        where = f"{path}, document {number + 1}"
        name = content.get("name") if isinstance(content, dict) else None
        if name is not None and (not isinstance(name, str) or not name or set(name) & set("/+@\\") or name[0] == "."):
            raise UsageError(f"{where}: name is {name!r}; give a word that can be a folder's name, without / + and @")
        if name in named:
            raise UsageError(f"{where}: {f'a second {name!r}' if name else 'a second one without a name'}")
        rest = {key: value for key, value in content.items() if key != "name"} if name else content
        named[name] = _parsed(rest, where)
    return _ordered(named, str(path))


def _parsed(content: Any, where: str) -> MergeRecipe:
    try:
        return parse_recipe(content, where)
    except UsageError as error:
        told = str(error)
        raise UsageError(told if told.startswith(where) else f"{where}: {told}") from None


def _ordered(named: Mapping[str | None, MergeRecipe], where: str) -> Stages:
    """The stages in an order in which they can be made; the output is the one without a name, or the last."""
    last = None if None in named else list(named)[-1]
    needs = {name: [n for n in map(_head, recipe.references) if n in named] for name, recipe in named.items()}
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise UsageError(f"{where}: stages that need each other: {', '.join(map(str, error.args[1]))}") from None
    used: set[str | None] = {last}
    for name in reversed(order):
        used |= set(needs[name]) if name in used else set()
    if unused := [name for name in named if name not in used]:
        told = f"'{last}'" if last else "the one without a name"
        raise UsageError(f"{where}: the output, {told}, does not use stage '{unused[0]}'")
    return Stages({str(name): named[name] for name in order if name != last}, named[last])


def _head(reference: str) -> str:
    """What a reference names, without adapters."""
    return reference.split("+")[0]


def plan_all(stages: Stages, sketches: Path, **settings: Any) -> tuple[dict[str, Plan], Plan]:
    """The plans of all stages, and of the output, on sketches of one another.

    sketches: an existing folder for what the stages will look like
    settings: of `plan_merge`
    raises: UsageError, InputError, with the stage's name; a plan with problems is the last one, in the output's place
    """
    plans: dict[str, Plan] = {}
    places = {name: sketches / name for name in stages.before}
    for name, recipe in stages.before.items():
        made = {each: places[each] for each in plans}
        plans[name] = _planned(f"stage {name}", recipe, made, **settings)
        if plans[name].problems:
            return plans, plans[name]
        plans[name].sketch(places[name])
    return plans, _planned("the output", stages.output, places, **settings)


def _planned(what: str, recipe: MergeRecipe, places: Mapping[str, Path], **settings: Any) -> Plan:
    try:
        plan = plan_merge(recipe, places=places, **settings)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    return replace(plan, problems=[f"{what}: {problem}" for problem in plan.problems])


def record(stages: Stages, plans: Sequence[Plan]) -> dict[str, Any]:
    """What the output's manifest tells of the stages, with a digest of all that the work depends on.

    plans: of all stages and the output, on sketches
    """
    recipes = {name: recipe.model_dump(mode="json", exclude_none=True) for name, recipe in stages.before.items()}
    inputs = {
        source.label: [asdict(file) for file in source.identity()]
        for plan in plans
        for source in plan.sources
        if _head(source.label) not in stages.before
    }
    work = [__version__, recipes, inputs, plans[-1].recipe, [shard.filename for shard in plans[-1].shards]]
    digest = hashlib.sha256(json.dumps(work, sort_keys=True, default=str).encode()).hexdigest()
    hub = [source.label for plan in plans for source in plan.sources if source.revision]
    return {"work": digest, "recipes": recipes, "hub": list(dict.fromkeys(hub))}


def plan_output(recipe: MergeRecipe, told: Mapping[str, Any], **settings: Any) -> Plan:
    """The plan of the output, with what its card and its manifest tell of the stages.

    told:     as `record` gives it
    settings: of `plan_merge`
    """
    plan = plan_merge(recipe, **settings)
    card = model_card(plan.recipe["merge"], plan.sources, stages=told["recipes"], hub=told["hub"])
    return replace(plan, files={**plan.files, "README.md": card.encode()}, about={**plan.about, "stages": told})


def maker(stages: Stages, told: Mapping[str, Any], folder: Path, **settings: Any) -> "partial[Plan]":
    """What makes the plan of the output when the stages are made; folder: where they are."""
    places = {name: folder / name for name in stages.before}
    return partial(plan_output, stages.output, told, places=places, **settings)
