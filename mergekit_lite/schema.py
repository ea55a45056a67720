"""What a merge recipe's JSON schema tells of the methods' parameters, made from the table of methods."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .methods.table import Parameter


def with_parameters(schema: dict[str, Any]) -> None:
    """Let a recipe's schema tell what it must have, and the parameters of each method."""
    from .methods.table import METHODS

    schema["oneOf"] = [{"required": [kind]} for kind in ("models", "slices", "modules")]
    schema["allOf"] = [of_method(name, method.per_model, method.shared) for name, method in METHODS.items()]


def of_method(name: str, per_model: "Mapping[str, Parameter]", shared: "Mapping[str, Parameter]") -> dict[str, Any]:
    """The condition that a recipe of one method fulfils: which parameters it takes, where, and in what range."""
    entries = {"items": {"properties": {"parameters": _object(per_model)}}}
    every = _object({**shared, **per_model})
    slices = {"items": {"properties": {"parameters": every, "sources": entries}}}
    module = {"properties": {"parameters": every, "models": entries, "slices": slices}}
    places = {"parameters": every, "models": entries, "slices": slices, "modules": {"additionalProperties": module}}
    then: dict[str, Any] = {"properties": places}
    required = [key for key, parameter in shared.items() if parameter.is_required]
    if required:
        given = {"properties": {"parameters": {"required": required}}, "required": ["parameters"]}
        then["anyOf"] = [given, {"required": ["slices"]}, {"required": ["modules"]}]
    return {"if": {"properties": {"merge_method": {"const": name}}, "required": ["merge_method"]}, "then": then}


def _object(parameters: "Mapping[str, Parameter]") -> dict[str, Any]:
    properties = {name: _setting(parameter) for name, parameter in parameters.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


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
