"""What the user asked: a merge recipe, in the words of mergekit's YAML.

A recipe comes from a file or from the command line's flags; either way it is validated here, once.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from wtool.dtypes import parse_float_dtype
from wtool.errors import UsageError, did_you_mean
from wtool.recipe_file import read_yaml, validated
from wtool.recipe_parts import one_of

from .methods.table import METHODS, Method
from .places import ModelEntry, Module, OutputSlice, Reference, Setting, check_parameters, overridden
from .schema import with_parameters
from .tokens.chat_template import check_template
from .tokens.recipe import TokenizerRecipe, tokenizer_asked

ON_INPUTS = ("regmean", "regmean++")  # methods that need what the weights are multiplied with: see `regmean_recipe`


class MergeRecipe(BaseModel):
    """A merge, as asked. The field names are those of mergekit's YAML, and rounding, which it has not."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=with_parameters)

    merge_method: str = Field(description="how the models are merged", json_schema_extra=one_of(METHODS))
    models: tuple[ModelEntry, ...] = Field(default=(), min_length=1, description="the models to merge")
    slices: tuple[OutputSlice, ...] | None = Field(
        default=None, min_length=1, description="in the place of models: the output's layers, from first to last"
    )
    modules: dict[str, Module] | None = Field(
        default=None, min_length=1, description="in the place of models: each tower of a model of several, by its name"
    )
    base_model: Reference | None = Field(default=None, description="checkpoint the models were fine-tuned from")
    parameters: dict[str, Setting] = Field(default_factory=dict, description="of the method, for all models")
    dtype: str | None = Field(default=None, description="type of the output's weights; null keeps the inputs'")
    out_dtype: str | None = Field(default=None, description="the same, and goes before dtype")
    rounding: Literal["nearest", "stochastic"] | None = Field(
        default=None,
        description="of the output to 16 bits; stochastic keeps changes smaller than a step; null: nearest, and "
        "stochastic for model_stock",
    )
    seed: int = Field(default=0, description="of random masks and random rounding")
    tokenizer: TokenizerRecipe | None = Field(default=None, description="which tokens the output has")
    tokenizer_source: Reference | None = Field(default=None, description="the old spelling of tokenizer: {source: …}")
    chat_template: str | None = Field(
        default=None,
        description="auto (the one that most models have), chatml, llama3, alpaca, mistral, exaone, or one in Jinja",
    )
    _remarks: tuple[str, ...] = PrivateAttr(default=())

    @property
    def method(self) -> Method:
        return METHODS[self.merge_method]

    @property
    def output_dtype(self) -> str | None:
        """The type of the output's weights, by its safetensors name; None keeps the inputs'."""
        asked = self.out_dtype or self.dtype
        return parse_float_dtype(asked) if asked else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was asked and has no effect."""
        slices = [*(self.slices or ()), *(each for module in self._modules for each in module.slices or ())]
        weighted = any(each.residual_weight is not None for each in slices)
        unused = {name for name, parameter in self.method.shared.items() if parameter.argument == ""}
        asked = sorted({name for _, parameters, _ in self._places() for name in parameters if name in unused})
        return (
            *self._remarks,
            *(f"'{name}' has no effect: it tells mergekit how to hold masks in memory" for name in asked),
            *(["'residual_weight' has no effect, as in mergekit"] if weighted else []),
        )

    @property
    def references(self) -> list[str]:
        """Every checkpoint that is named, the base first."""
        entries: list[str | None] = [self.base_model, *(entry.model for entry in self.models)]
        for slices in (self.slices or (), *(module.slices or () for module in self._modules)):
            for each in slices:
                entries += [each.base_model, *(source.model for source in each.sources)]
        entries += [entry.model for module in self._modules for entry in module.models]
        return list(dict.fromkeys(entry for entry in entries if entry))

    @property
    def _modules(self) -> Sequence[Module]:
        return list((self.modules or {}).values())

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            known = (*METHODS, *ON_INPUTS)
            raise UsageError(f"no merge method '{name}'{did_you_mean(name, known)} (there are {', '.join(known)})")
        return name

    @field_validator("chat_template")
    @classmethod
    def _known_template(cls, asked: str | None) -> str | None:
        return asked if asked is None else check_template(asked)

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> "MergeRecipe":
        kinds = [kind for kind in ("models", "slices", "modules") if getattr(self, kind)]
        if len(kinds) != 1:
            raise UsageError(
                f"a recipe has one of models, slices and modules; this one has {' and '.join(kinds) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _parameters_fit(self) -> "MergeRecipe":
        _ = self.output_dtype
        _ = tokenizer_asked(self.tokenizer, self.tokenizer_source)
        for where, parameters, is_shared in self._places():
            check_parameters(self.merge_method, where, parameters, is_shared)
        return self

    def _places(self) -> Iterator[tuple[str, Mapping[str, Setting], bool]]:
        """Where parameters stand: (how an error names it, the parameters, whether they are for all models)."""
        yield "parameters", self.parameters, True
        yield from ((f"model {entry.model}", entry.parameters, False) for entry in self.models)
        for number, each in enumerate(self.slices or ()):
            yield from each.places(f"slice {number}")
        for name, module in (self.modules or {}).items():
            yield from module.places(f"module {name}")

    @model_serializer(mode="wrap")
    def _without_empty_models(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "models" or value}


def parse_recipe(content: Any, where: str) -> MergeRecipe:
    """Validate a recipe.

    content: as YAML gives it
    where:   how an error names it
    raises:  UsageError, with the key and what would be right
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: a recipe is a mapping with merge_method and models")
    recipe = validated(MergeRecipe, content, where)
    recipe._remarks = tuple(overridden(content))
    return recipe


def read_recipe(path: Path) -> MergeRecipe:
    """Read a recipe file: mergekit's YAML."""
    return parse_recipe(read_yaml(path), str(path))
