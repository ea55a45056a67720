"""The places of a recipe where models are named: a list of models, slices of layers, modules; and their parameters."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from wtool.errors import UsageError, did_you_mean

from .methods.table import METHODS

Scalar = bool | int | float | str


class Filtered(BaseModel):
    """A value for the tensors whose name holds a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filter: str | None = Field(default=None, description="a text in the tensor's name; null and '*' fit every tensor")
    value: Scalar | list[int | float] = Field(description="a constant, or a gradient over the layers")


Setting = Scalar | list[int | float] | list[Filtered]
"""A constant, a gradient over the layers, or the first filter that fits."""

PATH_KEYS = ("path", "revision")
REFERENCE_KEYS = ("model", "lora", "override_architecture")


def reference(written: Any) -> Any:
    """A model's reference, also in mergekit's long spelling: {model: {path, revision}, lora: …}.

    raises: UsageError for a key that has no place there
    """
    if not isinstance(written, Mapping):
        return written
    if "path" in written:
        _check_keys(written, PATH_KEYS)
        revision = written.get("revision")
        return f"{written['path']}@{revision}" if revision else str(written["path"])
    _check_keys(written, REFERENCE_KEYS)
    if "model" not in written:
        raise UsageError("a model is a text, or {model: {path, revision}, lora: …}; 'model' is missing")
    parts = [reference(written["model"]), reference(written.get("lora"))]
    return "+".join(str(part) for part in parts if part is not None)


def _check_keys(written: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in written:
        if key not in known:
            raise UsageError(f"unknown key '{key}' of a model{did_you_mean(str(key), known)} (there are {known})")


def overridden(content: Any) -> list[str]:
    """A remark for each architecture that a recipe as written names for a model."""
    if isinstance(content, list):
        return [remark for item in content for remark in overridden(item)]
    if not isinstance(content, dict):
        return []
    if content.get("override_architecture") is not None and "model" in content:
        return [f"{reference(content)}: 'override_architecture' has no effect: no list of architectures is used"]
    return [remark for value in content.values() for remark in overridden(value)]


_PATH: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"path": {"type": "string"}, "revision": {"type": ["string", "null"]}},
            "required": ["path"],
            "additionalProperties": False,
        },
    ]
}
_LONG: dict[str, Any] = {
    "type": "object",
    "properties": {"model": _PATH, "lora": _PATH, "override_architecture": {"type": ["string", "null"]}},
    "required": ["model"],
    "additionalProperties": False,
}
Reference = Annotated[str, BeforeValidator(reference), WithJsonSchema({"anyOf": [*_PATH["anyOf"], _LONG]})]
"""A checkpoint by its name: a folder, file or Hub id (org/name@revision), with +adapter for LoRA adapters."""

Places = Iterator[tuple[str, Mapping[str, Setting], bool]]
"""(how an error names the place, its parameters, whether they are for all models)"""


class ModelEntry(BaseModel):
    """One of the models to merge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Reference = Field(description="folder, file or Hub id (org/name@revision), with +adapter for LoRA adapters")
    parameters: dict[str, Setting] = Field(default_factory=dict, description="of the method, for this model")


class SliceSource(ModelEntry):
    """Layers of a model."""

    layer_range: tuple[int, int] = Field(description="its first layer, counted from 0, and the one after its last")

    @property
    def layers(self) -> range:
        return range(*self.layer_range)

    @model_validator(mode="after")
    def _has_layers(self) -> "SliceSource":
        first, end = self.layer_range
        if first < 0 or end <= first:
            raise UsageError(
                f"layer_range [{first}, {end}] of {self.model} has no layers; give the first, counted from 0, "
                "and the one after the last"
            )
        return self


class OutputSlice(BaseModel):
    """Layers of the output: those of one model, or several models' merged one by one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SliceSource, ...] = Field(min_length=1, description="as many layers of each")
    base_model: Reference | None = Field(default=None, description="in the place of the recipe's, for this slice")
    parameters: dict[str, Setting] = Field(default_factory=dict, description="of the method, for this slice")
    residual_weight: float | None = Field(default=None, description="mergekit's; it has no effect")

    @property
    def depth(self) -> int:
        """Layers of the output."""
        return len(self.sources[0].layers)

    @model_validator(mode="after")
    def _equally_long(self) -> "OutputSlice":
        lengths = [len(source.layers) for source in self.sources]
        if len(set(lengths)) > 1:
            told = ", ".join(f"{list(each.layer_range)} of {each.model}" for each in self.sources)
            raise UsageError(f"the sources of a slice have as many layers each; here are {told}")
        return self

    def places(self, where: str) -> Places:
        yield f"{where}: parameters", self.parameters, True
        yield from ((f"{where}: model {source.model}", source.parameters, False) for source in self.sources)


class Module(BaseModel):
    """What one tower of the output is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[ModelEntry, ...] = Field(default=(), min_length=1, description="the models to merge")
    slices: tuple[OutputSlice, ...] | None = Field(
        default=None, min_length=1, description="in the place of models: the tower's layers, from first to last"
    )
    parameters: dict[str, Setting] = Field(default_factory=dict, description="of the method, for this module")

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> "Module":
        if bool(self.models) == bool(self.slices):
            raise UsageError(f"a module has either models or slices; this one has {'both' if self.models else 'none'}")
        return self

    def places(self, where: str) -> Places:
        yield f"{where}: parameters", self.parameters, True
        yield from ((f"{where}: model {entry.model}", entry.parameters, False) for entry in self.models)
        for number, each in enumerate(self.slices or ()):
            yield from each.places(f"{where}, slice {number}")


def check_parameters(method: str, where: str, parameters: Mapping[str, Setting], is_shared: bool) -> None:
    """Refuse parameters that a method does not have, or not in this place. raises: UsageError"""
    row = METHODS[method]
    for name in parameters:
        if name not in row.parameters:
            known = sorted(row.parameters)
            raise UsageError(
                f"{where}: {method} has no parameter '{name}'{did_you_mean(name, known)} (it has {', '.join(known)})"
            )
        if not is_shared and name in row.shared:
            raise UsageError(f"{where}: '{name}' is one for all models; give it under the recipe's parameters")
