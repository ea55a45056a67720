"""What the user asked: a merge recipe, in the words of mergekit's YAML, and the table of methods.

A recipe comes from a file or from the command line's flags; either way it is validated here, once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wtool.dtypes import parse_float_dtype
from wtool.errors import UsageError, did_you_mean
from wtool.recipe_file import read_yaml, validated
from wtool.recipe_parts import one_of

from .dare import dare_linear, dare_ties
from .linear import linear
from .passthrough import passthrough
from .schema import of_method
from .slerp import slerp
from .task_arithmetic import task_arithmetic
from .ties import ties

REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """One number (or switch) of a method."""

    default: Any = REQUIRED
    low: float | None = None
    high: float | None = None
    choices: Mapping[Any, Any] | None = None  # spelling -> value, for parameters that are not numbers
    argument: str | None = None  # the function's name for it, where that differs

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    def check(self, value: Any, what: str) -> Any:
        """Turn a user's value into the function's; raises UsageError."""
        if self.choices is not None:
            if not isinstance(value, (bool, str)) or value not in self.choices:
                raise UsageError(f"{what} is {value!r}; it must be one of {', '.join(map(str, self.choices))}")
            return self.choices[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise UsageError(f"{what} is {value!r}; it must be a number")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise UsageError(f"{what} is {value}; it must be between {self.low} and {self.high}")
        return float(value)


SWITCH = {True: True, False: False}
WEIGHT = Parameter(default=1.0)
DENSITY = Parameter(default=1.0, low=0.0, high=1.0)
LAMBDA = Parameter(default=1.0, argument="lambda_")
IGNORED = Parameter(default=False, choices=SWITCH, argument="")  # mergekit's, without effect on results
DARE_RESCALE = Parameter(
    default="density",
    choices={True: "density", "density": "density", "l1": "l1", False: "none", "none": "none"},
)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    function: Callable[..., Any]
    summary: str
    has_base: bool = False  # takes (base, models, …), and needs a base; else (models, …)
    least: int = 1  # models, the base not counted where the method has one
    most: int | None = None
    per_model: Mapping[str, Parameter] = field(default_factory=dict)
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    is_random: bool = False

    @property
    def parameters(self) -> set[str]:
        return {*self.per_model, *self.shared}


def _normalize(default: bool) -> Parameter:
    return Parameter(default=default, choices=SWITCH)


METHODS: dict[str, Method] = {
    "linear": Method(
        linear,
        "weighted mean (a soup)",
        per_model={"weight": WEIGHT},
        shared={"normalize": _normalize(True)},
    ),
    "slerp": Method(
        slerp,
        "between two models along the arc",
        least=2,
        most=2,
        shared={"t": Parameter()},
    ),
    "task_arithmetic": Method(
        task_arithmetic,
        "base plus weighted task vectors",
        has_base=True,
        per_model={"weight": WEIGHT},
        shared={"normalize": _normalize(False), "lambda": LAMBDA, "int8_mask": IGNORED},
    ),
    "ties": Method(
        ties,
        "trim, elect signs, average what agrees",
        has_base=True,
        per_model={"weight": WEIGHT, "density": DENSITY},
        shared={
            "normalize": _normalize(True),
            "rescale": Parameter(default=False, choices=SWITCH),
            "lambda": LAMBDA,
            "int8_mask": IGNORED,
        },
    ),
    "dare_linear": Method(
        dare_linear,
        "drop at random, rescale, sum",
        has_base=True,
        per_model={"weight": WEIGHT, "density": DENSITY},
        shared={"normalize": _normalize(False), "rescale": DARE_RESCALE, "lambda": LAMBDA, "int8_mask": IGNORED},
        is_random=True,
    ),
    "dare_ties": Method(
        dare_ties,
        "drop at random, rescale, elect signs, sum",
        has_base=True,
        per_model={"weight": WEIGHT, "density": DENSITY},
        shared={"normalize": _normalize(False), "rescale": DARE_RESCALE, "lambda": LAMBDA, "int8_mask": IGNORED},
        is_random=True,
    ),
    "passthrough": Method(
        passthrough,
        "one model as it is, or scaled",
        most=1,
        shared={"scale": Parameter(default=1.0)},
    ),
}

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
