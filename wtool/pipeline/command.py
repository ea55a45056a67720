"""A job as the command line that carries it out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from wtool import options
from wtool.cli import load
from wtool.errors import UsageError, did_you_mean

from .jobs import Folder, Job, content_of, options_of
from .recipe import VERBS, Pipeline


def arguments(job: Job, pipeline: Pipeline, folder: Folder, recipe: Path) -> list[str]:
    """The verb and what follows it, without where the output goes.

    folder: how the output of another job is called
    recipe: a file to write the verb's recipe to, where it has one
    raises: UsageError
    """
    content = content_of(job, pipeline, folder)
    beside = options_of(job, pipeline, folder) | _shared(job, pipeline)
    if not VERBS[job.verb].has_recipe:
        return [job.verb, *_spelled(job, content | beside)]
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return [job.verb, str(recipe), *_spelled(job, beside)]


def destination(output: Path | None) -> list[str]:
    return [] if output is None else ["-o", str(output)]


def _shared(job: Job, pipeline: Pipeline) -> dict[str, Any]:
    """The pipeline's options that this verb has, and that the stage does not give itself.

    raises: UsageError for one that no verb has
    """
    shared: dict[str, Any] = {}
    for name, value in pipeline.options.items():
        key = name.replace("-", "_")
        if key in _parameters(job.verb):
            shared |= {} if name in job.asked.options else {name: value}
        elif not any(key in _parameters(verb) for verb in VERBS):
            raise UsageError(f"options: no verb has '{name}'")
    return shared


def command_of(verb: str) -> Any:
    """A verb as click knows it."""
    return options.command_of(load(verb))


def _parameters(verb: str) -> dict[str, Any]:
    """A verb's parameters by what a pipeline calls them."""
    return {_key(parameter): parameter for parameter in command_of(verb).params}


def _spelled(job: Job, given: Mapping[str, Any]) -> list[str]:
    """Names and values as a command line has them.

    raises: UsageError for a name that the verb does not know
    """
    parameters = _parameters(job.verb)
    first = next(parameter for parameter in parameters.values() if parameter.param_type_name == "argument")
    parameters[VERBS[job.verb].subject] = first
    parts: list[str] = []
    behind: dict[str, list[str]] = {}  # arguments without a name, which are told by their place
    for name, value in given.items():
        key = name.replace("-", "_")
        if key not in parameters:
            raise UsageError(f"stage '{job.stage}': wtool {job.verb} has no '{name}'{did_you_mean(key, parameters)}")
        values = value if isinstance(value, list) else [value]
        if parameters[key].param_type_name == "argument":
            behind[parameters[key].name] = [*map(str, values)]
        else:
            parts += [part for each in values for part in _option(parameters[key], each)]
    return [*parts, *(text for parameter in parameters.values() for text in behind.pop(parameter.name, []))]


def _key(parameter: Any) -> str:
    """What a pipeline calls a parameter: the long name of an option, without its dashes."""
    long = next((name for name in parameter.opts if name.startswith("--")), None)
    return (long or str(parameter.name)).lstrip("-").replace("-", "_")


def _option(parameter: Any, value: Any) -> list[str]:
    if isinstance(value, bool):
        names = parameter.opts if value else parameter.secondary_opts
        if parameter.is_flag:
            return [max(names, key=len)] if names else []
        value = str(value).lower()
    if isinstance(value, Mapping):
        raise UsageError(f"'{_key(parameter)}': a mapping, where a value was expected")
    return [max(parameter.opts, key=len), str(value)]
