"""From a recipe to a plan: which tensors go into which, with which numbers; and every problem there is.

It works from headers, so it takes as long for a model on the Hub that nobody has downloaded as for one on disk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.checkpoint.folder import TOKENIZER_FILES
from wtool.checkpoint.quantized import refuse_quantized
from wtool.checkpoint.tied import embedding_name, head_name, is_tied
from wtool.plan import DEFAULT_SHARD_BYTES, Plan
from wtool.shards import json_bytes

from .card import model_card
from .lineage import common_base
from .output_config import config_problems, output_config
from .recipe import MergeRecipe
from .steps import Steps
from .tokens.chat_template import chosen_template, template_remarks, with_template
from .tokens.choice import choose_vocabulary
from .tokens.recipe import tokenizer_asked
from .wanted import wanted

NO_PLACES: Mapping[str, Path] = {}


def plan_merge(
    recipe: MergeRecipe,
    *,
    headers_only: bool = False,
    low_disk: Path | None = None,
    ignore_tokenizers: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    places: Mapping[str, Path] = NO_PLACES,
) -> Plan:
    """Make the plan of a merge.

    headers_only: models on the Hub are not downloaded; the plan can be shown and not run
    low_disk: a folder to keep the shards of models on the Hub in while they are read, instead of the cache
    ignore_tokenizers: merge though the same numbers mean other tokens
    places: the folders of models that the recipe names by the stages that make them

    raises: UsageError, InputError where there is nothing to plan on; else `Plan.problems` tells
    """

    def opened(name: str) -> Checkpoint:
        return _opened(name, places, headers_only, low_disk)

    warnings = list(recipe.remarks)
    if recipe.method.has_base and recipe.base_model is None:
        if found := common_base([opened(name) for name in recipe.references]):
            recipe = recipe.model_copy(update={"base_model": found})
            warnings.append(f"no base is given; took {found}, which the cards of all models name")
    references = recipe.references
    checkpoints = {name: opened(name) for name in references}
    for checkpoint in checkpoints.values():
        refuse_quantized(checkpoint)
    sources = tuple(checkpoints.values())
    donor = checkpoints[references[0]]
    tokens = tokenizer_asked(recipe.tokenizer, recipe.tokenizer_source)
    chosen = choose_vocabulary(tokens, checkpoints, recipe.base_model, ignore_tokenizers)
    vocabulary, problems, remarks = chosen.vocabulary, chosen.problems, chosen.warnings

    names = list(dict.fromkeys(name for source in (donor, *sources) for name in source.tensors))
    head, embedding = head_name(names), embedding_name(names)
    if head and embedding and all(is_tied(source.config) for source in sources):
        names.remove(head)
    steps = Steps(
        sources,
        {name: number for number, name in enumerate(references)},
        head=head,
        embedding=embedding,
        dtype=recipe.output_dtype,
        rounding=recipe.rounding,
        seed=recipe.seed,
        vocabulary=vocabulary,
    )
    layout = wanted(recipe, checkpoints, names)
    made = tuple(step for each in layout.tensors if (step := steps.step(each)))
    outputs = {name: info for step in made for name, info in step.outputs.items()}
    config = output_config(layout.config, outputs)
    files: dict[str, Any] = {name: path for name, path in donor.files.items() if name != "README.md"}
    if vocabulary is not None:
        config = vocabulary.configured(config) if config else {}
        files = {name: path for name, path in files.items() if name not in TOKENIZER_FILES} | dict(vocabulary.files)
        problems, remarks = [*problems, *vocabulary.problems], [*remarks, *vocabulary.warnings]
    if recipe.chat_template is not None:
        template = chosen_template(recipe.chat_template, sources)
        remarks = [*remarks, *template_remarks(recipe.chat_template, template, chosen.tokens)]
        files = files if template is None else with_template(files, template)
    if config:
        files["config.json"] = json_bytes(config)
    record = recipe.model_dump(mode="json", exclude_none=True)
    files["README.md"] = model_card(record, sources).encode()
    return Plan(
        sources=sources,
        steps=made,
        files=files,
        recipe={"merge": record},
        problems=[*steps.problems, *layout.problems, *problems, *config_problems(config, outputs, sources)],
        warnings=[*warnings, *layout.remarks, *remarks],
        max_shard_bytes=max_shard_bytes,
    )


def _opened(name: str, places: Mapping[str, Path], headers_only: bool, low_disk: Path | None) -> Checkpoint:
    """A checkpoint by the name that a recipe has for it."""
    stage, plus, adapters = name.partition("+")
    if stage not in places:
        return open_checkpoint(name, headers_only=headers_only, low_disk=low_disk)
    checkpoint = open_checkpoint(f"{places[stage]}{plus}{adapters}", headers_only=headers_only, low_disk=low_disk)
    checkpoint.label = name
    return checkpoint
