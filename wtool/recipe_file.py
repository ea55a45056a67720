"""Reading what a user wrote: YAML into a recipe, and pydantic's complaints into one line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from wtool.errors import UsageError, did_you_mean

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def read_yaml(path: Path) -> Any:
    """A YAML file's content.

    raises: UsageError
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start:,}; give a text file") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def validated(model: type[AnyModel], content: Any, where: str) -> AnyModel:
    """Make a recipe of what was written.

    where:  how an error names it
    raises: UsageError, with the key and what would be right
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: {_in_words(model, error)}") from None


def parsed(model: type[AnyModel], content: Any, where: str) -> AnyModel:
    """Make a recipe of what should be a mapping.

    where:  how an error names it
    raises: UsageError, with the key and what would be right
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: a recipe is a mapping with {', '.join(list(model.model_fields)[:3])}, …")
    return validated(model, content, where)


def read_recipe(model: type[AnyModel], path: Path, verb: str) -> AnyModel:
    """Read a recipe file, or what a manifest has under the verb's name.

    raises: UsageError
    """
    content = read_yaml(path)
    if isinstance(content, dict) and isinstance(content.get(verb), dict):
        content = content[verb]
    return parsed(model, content, str(path))


def asked(model: type[AnyModel], verb: str, subject: str, reference: str, flags: Mapping[str, Any]) -> AnyModel:
    """The recipe of a command line: a file of one, or what it is of and flags.

    subject:   the key of what the command's first argument names
    reference: that argument
    raises:    UsageError
    """
    if not reference.endswith((".yml", ".yaml")):
        return parsed(model, {subject: reference, **flags}, "command line")
    if flags:
        raise UsageError(
            f"{reference}: a recipe file tells everything; '{next(iter(flags))}' cannot be given beside it"
        )
    return read_recipe(model, Path(reference), verb)


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {key: value for key, value in flags.items() if value is not None}


def named_value(flag: str, text: str) -> tuple[str, Any]:
    """What NAME=VALUE on a command line says, the value as YAML reads it (and 1e-8 as the number it is).

    raises: UsageError
    """
    name, sign, written = text.partition("=")
    if not name or not sign:
        raise UsageError(f"{flag} '{text}': write NAME=VALUE")
    try:
        value = yaml.safe_load(written) if written else ""
    except yaml.YAMLError:
        raise UsageError(f"{flag} '{text}': '{written}' is not a value that YAML can read") from None
    try:
        return name, float(value) if isinstance(value, str) else value
    except ValueError:
        return name, value


def _in_words(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if not _is_type_name(part))
    if first["type"] == "extra_forbidden":
        known = _owner(model, first["loc"][:-1]).model_fields
        return f"unknown key '{place}'{did_you_mean(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"'{place}' is missing"
    return f"'{place}': {first['msg'].lower()} (found {str(first['input'])[:60]!r})"


def _owner(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """The model that a path of keys leads to, as far as it does."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = [kind for kind in _types(field.annotation) if issubclass(kind, BaseModel)] if field else []
        model = inner[0] if inner else model
    return model


def _types(annotation: Any) -> list[type]:
    """The classes an annotation speaks of, from the outside in."""
    found = [annotation] if isinstance(annotation, type) else []
    return found + [kind for part in get_args(annotation) for kind in _types(part)]


def _is_type_name(part: int | str) -> bool:
    """pydantic names the member of a union that it tried; a user does not know those."""
    return isinstance(part, str) and (part in ("bool", "int", "float", "str") or "[" in part)
