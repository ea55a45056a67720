"""What a merge recipe's JSON schema tells of the methods' parameters, made from the table of methods."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .methods import Parameter


def of_method(name: str, per_model: "Mapping[str, Parameter]", shared: "Mapping[str, Parameter]") -> dict[str, Any]:
    """The condition that a recipe of one method fulfils: which parameters it takes, where, and in what range."""
    own = _object(per_model, needed=False)
    entry = {"properties": {"parameters": own}}
    parameters = _object({**shared, **per_model}, needed=True)
    then: dict[str, Any] = {"properties": {"parameters": parameters, "models": {"items": entry}}}
    if parameters.get("required"):
        then["required"] = ["parameters"]
    return {"if": {"properties": {"merge_method": {"const": name}}, "required": ["merge_method"]}, "then": then}


def _object(parameters: "Mapping[str, Parameter]", *, needed: bool) -> dict[str, Any]:
    required = [name for name, parameter in parameters.items() if parameter.is_required]
    return {
        "type": "object",
        "properties": {name: _setting(parameter) for name, parameter in parameters.items()},
        "additionalProperties": False,
        **({"required": required} if needed and required else {}),
    }


def _setting(parameter: "Parameter") -> dict[str, Any]:
    """A constant, a gradient over the layers, or filters with either."""
    constant = _constant(parameter)
    values = [constant] if parameter.choices is not None else [constant, {"type": "array", "items": constant}]
    filtered = {
        "type": "object",
        "properties": {"filter": {"type": ["string", "null"]}, "value": {"anyOf": values}},
        "required": ["value"],
        "additionalProperties": False,
    }
    default = {} if parameter.is_required else {"default": _spelling(parameter)}
    return {"anyOf": [*values, {"type": "array", "items": filtered}], **default}


def _constant(parameter: "Parameter") -> dict[str, Any]:
    if parameter.choices is not None:
        return {"enum": list(parameter.choices)}
    ends = {"minimum": parameter.low, "maximum": parameter.high}
    return {"type": "number", **{key: end for key, end in ends.items() if end is not None}}


def _spelling(parameter: "Parameter") -> Any:
    """A default as a user writes it."""
    choices = parameter.choices or {}
    return next((spelling for spelling, value in choices.items() if value == parameter.default), parameter.default)
