"""What the user asked: a merge recipe, in the words of mergekit's YAML.

A recipe comes from a file or from the command line's flags; either way it is validated here, once.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wtool.dtypes import parse_float_dtype
from wtool.errors import UsageError, did_you_mean
from wtool.recipe_file import read_yaml, validated
from wtool.recipe_parts import one_of

from .methods import METHODS, Method
from .schema import of_method

Scalar = bool | int | float | str


def with_parameters(schema: dict[str, Any]) -> None:
    """Let a recipe's schema tell the parameters of each method."""
    schema["allOf"] = [of_method(name, method.per_model, method.shared) for name, method in METHODS.items()]


class Filtered(BaseModel):
    """A value for the tensors whose name holds a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filter: str | None = Field(default=None, description="a text in the tensor's name; null and '*' fit every tensor")
    value: Scalar | list[int | float] = Field(description="a constant, or a gradient over the layers")


Setting = Scalar | list[int | float] | list[Filtered]
"""A constant, a gradient over the layers, or the first filter that fits."""


class ModelEntry(BaseModel):
    """One of the models to merge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="folder, file or Hub id (org/name@revision), with +adapter for LoRA adapters")
    parameters: dict[str, Setting] = Field(default_factory=dict, description="of the method, for this model")


class MergeRecipe(BaseModel):
    """A merge, as asked. The field names are those of mergekit's YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=with_parameters)

    merge_method: str = Field(description="how the models are merged", json_schema_extra=one_of(METHODS))
    models: tuple[ModelEntry, ...] = Field(min_length=1, description="the models to merge")
    base_model: str | None = Field(default=None, description="checkpoint the models were fine-tuned from")
    parameters: dict[str, Setting] = Field(default_factory=dict, description="of the method, for all models")
    dtype: str | None = Field(default=None, description="type of the output's weights; null keeps the inputs'")
    out_dtype: str | None = Field(default=None, description="the same, and goes before dtype")
    seed: int = Field(default=0, description="of random masks")

    @property
    def method(self) -> Method:
        return METHODS[self.merge_method]

    @property
    def output_dtype(self) -> str | None:
        """The type of the output's weights, by its safetensors name; None keeps the inputs'."""
        asked = self.out_dtype or self.dtype
        return parse_float_dtype(asked) if asked else None

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise UsageError(f"no merge method '{name}'{did_you_mean(name, METHODS)} (there are {', '.join(METHODS)})")
        return name

    @model_validator(mode="after")
    def _parameters_fit(self) -> "MergeRecipe":
        _ = self.output_dtype
        places = [(f"model {entry.model}", entry.parameters) for entry in self.models]
        for where, parameters in [("parameters", self.parameters), *places]:
            for name in parameters:
                if name not in self.method.parameters:
                    known = sorted(self.method.parameters)
                    raise UsageError(
                        f"{where}: {self.merge_method} has no parameter '{name}'{did_you_mean(name, known)} "
                        f"(it has {', '.join(known)})"
                    )
                if where != "parameters" and name in self.method.shared:
                    raise UsageError(f"{where}: '{name}' is one for all models; give it under the recipe's parameters")
        return self


MERGEKIT_LATER = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")


def parse_recipe(content: Any, where: str) -> MergeRecipe:
    """Validate a recipe.

    content: as YAML gives it
    where:   how an error names it
    raises:  UsageError, with the key and what would be right
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: a recipe is a mapping with merge_method and models")
    later = next((key for key in MERGEKIT_LATER if key in content), None)
    if later:
        raise UsageError(f"{where}: '{later}' is not supported yet (merge_method, models, base_model, parameters are)")
    return validated(MergeRecipe, content, where)


def read_recipe(path: Path) -> MergeRecipe:
    """Read a recipe file: mergekit's YAML."""
    return parse_recipe(read_yaml(path), str(path))
