"""`wtool quantize` where bits are to be spread over layers: statistics first, then the grid of every layer.

Statistics that are not given are gathered in a hidden folder beside the output, with what was settled by them. It
goes when the output is whole; until then a stopped run finds there what it had done.

    .NAME.allocation/
        stats/           as `wtool calibrate --gradients` makes them; of a rotated model, with the rotation in its name
        settled.json     the recipe with every layer's grid
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool import __version__, console
from wtool.checkpoint import Checkpoint
from wtool.console import emit, human_bytes
from wtool.ranks import one_process
from wtool.shards import json_bytes
from wtool.statistics_folder import Statistics, check_model, open_statistics
from wtool.writer import MANIFEST, disk_errors

from .allocated import Settled, settle, uniform
from .planner import QuantPlan, plan_quantize
from .recipe import QuantRecipe, parse_recipe
from .rotating import rotation_noted

if TYPE_CHECKING:
    from wtool.calibrate import Progress, Where

ABOUT = "allocation"  # in the manifest
SETTLED = "settled.json"


def folder_of(output: Path) -> Path:
    """Where statistics are gathered that only the allocation needs."""
    return output.parent / f".{output.name}.allocation"


def allocated_plan(
    recipe: QuantRecipe,
    output: Path | None,
    where: "Where",
    *,
    dry_run: bool,
    max_shard_bytes: int,
    force: bool,
    quiet: bool,
) -> tuple[QuantRecipe, QuantPlan]:
    """The recipe with every layer's grid, and its plan; for a dry run without statistics, with one grid for all.

    raises: WtoolError
    """
    one_process("bits spread over layers")
    untold = dry_run and recipe.statistics is None
    base = plan_quantize(uniform(recipe), headers_only=untold, max_shard_bytes=max_shard_bytes)
    base.plan.check()
    if untold:
        console.remark("which layer gets which bits is told by statistics: with --stats a dry run shows it; until then")
        return uniform(recipe), base
    source = base.plan.sources[0]
    given = None if recipe.statistics is None else open_statistics(Path(recipe.statistics))
    key = _key(recipe, source, given)
    settled = None if force or output is None else _known(output, key)
    if settled is None:
        statistics = given or _gathered(recipe, source, output, where, force, quiet)
        check_model(statistics, source)
        settled = _settle(recipe, base, statistics, max_shard_bytes, quiet)
        if given is None and output is not None:
            with disk_errors(output):
                (folder_of(output) / SETTLED).write_bytes(json_bytes(_record(settled, key)))
    plan = plan_quantize(settled.recipe, max_shard_bytes=max_shard_bytes)
    about = {**plan.plan.about, ABOUT: {"key": key, **settled.about}}
    return settled.recipe, replace(plan, plan=replace(plan.plan, about=about))


def drop_statistics(output: Path) -> None:
    """Forget what was gathered for the allocation."""
    shutil.rmtree(folder_of(output), ignore_errors=True)


def show_allocation(plan: QuantPlan) -> None:
    """Print what each kind of layer got."""
    told: Mapping[str, Any] | None = plan.plan.about.get(ABOUT)
    if told is None:
        return
    kinds: dict[str, Counter[str]] = {}
    several = len({grid["group_size"] for grid in told["layers"].values()}) > 1
    for module, grid in told["layers"].items():
        text = f"{grid['bits']} bits" + (f" in groups of {grid['group_size']}" if several else "")
        kinds.setdefault(module.rpartition(".")[2], Counter())[text] += 1
    for kind, counts in kinds.items():
        emit(f"  {kind}: {', '.join(f'{counts[text]} x {text}' for text in sorted(counts))}")
    asked = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told["asked"].items())
    emit(
        f"  {asked}: {human_bytes(told['bytes'])} of {human_bytes(told['budget_bytes'])} for these layers; "
        f"foretold loss {told['predicted_loss']:.3g}{' nats per token' if told['weighted'] else ''}, "
        f"at most {told['gap']:.2%} above the least there is"
    )


def save_recipe(recipe: QuantRecipe, path: Path) -> None:
    """Write a recipe that gives every layer the same grid again, without statistics of its own.

    raises: OutputError
    """
    import yaml

    content = recipe.model_dump(mode="json", exclude_unset=True)
    with disk_errors(path):
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000), encoding="utf-8")


def _gathered(
    recipe: QuantRecipe, source: Checkpoint, output: Path | None, where: "Where", force: bool, quiet: bool
) -> Statistics:
    from wtool.calibration_data.for_model import windows_asked
    from wtool.statistics_walk import gather

    assert output is not None, "a dry run without statistics has ended"
    windows = windows_asked(source, recipe.calibration, trust_remote_code=where.trust_remote_code)
    stats = folder_of(output) / "-".join(["stats", *rotation_noted(source).values()])
    with ExitStack() as stack:

        def start(steps: int) -> "Progress":
            stack.close()  # what is shown of the walk before
            return stack.enter_context(console.progress("calibrating", steps, quiet=quiet, unit="steps"))

        gather(source, windows, stats, where=where, gradients=True, force=force, start=start)
    return open_statistics(stats)


def _settle(recipe: QuantRecipe, base: QuantPlan, statistics: Statistics, max_shard_bytes: int, quiet: bool) -> Settled:
    if not statistics.manifest.get("gradients") and not quiet:
        console.remark(
            f"{statistics.matrices.label}: without gradients every layer counts alike; `wtool calibrate --gradients` "
            "tells how much the answer hangs on each"
        )
    with console.progress("measuring", len(base.layers), quiet=quiet, unit="layers") as progress:
        return settle(recipe, base, statistics, max_shard_bytes=max_shard_bytes, progress=progress)


def _key(recipe: QuantRecipe, source: Checkpoint, given: Statistics | None) -> str:
    """Tells what an allocation was made of."""
    read = [source] if given is None else [source, given.matrices]
    files = [[asdict(file) for file in each.identity()] for each in read]
    asked = {"wtool": __version__, "recipe": recipe.model_dump(mode="json"), "files": files}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _record(settled: Settled, key: str) -> dict[str, Any]:
    recipe = settled.recipe.model_dump(mode="json", exclude_unset=True)
    return {"recipe": {"quantize": recipe}, ABOUT: {"key": key, **settled.about}}


def _known(output: Path, key: str) -> Settled | None:
    """What was settled by an earlier run of the same, whether it came to its end or not."""
    for path in (output / MANIFEST, folder_of(output) / SETTLED):
        try:
            told = json.loads(path.read_bytes())
            if told.get(ABOUT, {}).get("key") == key:
                about = {name: value for name, value in told[ABOUT].items() if name != "key"}
                return Settled(parse_recipe(told["recipe"]["quantize"], str(path)), about)
        except (OSError, ValueError, AttributeError, KeyError):
            continue
    return None
