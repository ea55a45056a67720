"""The recipe that a command line of `wtool merge` asks for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.errors import UsageError

if TYPE_CHECKING:
    from .recipe import MergeRecipe

OF_THE_MERGE = ("merge_method", "base_model", "dtype", "rounding", "seed", "tokenizer_source", "chat_template")


def is_file(models: Sequence[str]) -> bool:
    """Whether a recipe file stands in the place of models."""
    return models[0].endswith((".yml", ".yaml"))


def beside_file(path: str, extra: str) -> UsageError:
    """What is wrong with an argument beside a recipe file."""
    return UsageError(f"{path}: a recipe file tells everything; '{extra}' cannot be given beside it")


def recipe_asked(models: Sequence[str], flags: Mapping[str, Any]) -> "MergeRecipe":
    """The recipe of a file, or of models and options.

    flags: what is given, by the names that recipes have for it
    raises: UsageError
    """
    from .recipe import parse_recipe, read_recipe

    if is_file(models):
        if len(models) > 1 or flags:
            raise beside_file(models[0], models[1] if len(models) > 1 else f"--{next(iter(flags))}")
        return read_recipe(Path(models[0]))
    content: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {}} for model in models],
        **{key: value for key, value in flags.items() if key in OF_THE_MERGE},
    }
    parameters: dict[str, Any] = {}
    for key, value in flags.items():
        if key in OF_THE_MERGE:
            continue
        if isinstance(value, list) and len(value) > 1:
            _give_each(content["models"], key, value)
        else:
            parameters[key] = value[0] if isinstance(value, list) else value
    if content["merge_method"] == "ties" and parameters.get("rescale") in ("l1", "none"):
        parameters["rescale"] = parameters["rescale"] == "l1"
    return parse_recipe({**content, "parameters": parameters}, "command line")


def _give_each(entries: Sequence[dict[str, Any]], key: str, values: Sequence[float]) -> None:
    """Write one value of a parameter to each model's entry."""
    if len(values) != len(entries):
        raise UsageError(
            f"--{key} is given {len(values)} times for {len(entries)} models; give it once, or once a model"
        )
    for entry, number in zip(entries, values, strict=True):
        entry["parameters"][key] = number
