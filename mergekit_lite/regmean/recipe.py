"""What the user asked of RegMean: models, each with its text or its statistics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from wtool.dtypes import parse_float_dtype
from wtool.errors import UsageError
from wtool.recipe_file import parsed
from wtool.recipe_parts import Calibration

from ..methods.regmean import ALPHA, DAMPING
from ..places import Reference
from ..recipe import ON_INPUTS, MergeRecipe, parse_recipe

FROZEN = ConfigDict(frozen=True, extra="forbid")


class OwnNumbers(BaseModel):
    """Numbers of one model."""

    model_config = FROZEN

    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="factor of its Gram matrices and weights")


class Numbers(BaseModel):
    """Numbers of the method."""

    model_config = FROZEN

    alpha: float = Field(default=ALPHA, ge=0, le=1, description="factor of what is off the Gram matrices' diagonals")
    damping: float = Field(default=DAMPING, ge=0, le=1, description="share of the diagonal's mean to add to it")


class OwnModel(BaseModel):
    """One of the models to merge."""

    model_config = FROZEN

    model: Reference = Field(description="folder, file or Hub id (org/name@revision), with +adapter for LoRA adapters")
    data: tuple[str, ...] = Field(default=(), description="its text, in the place of the calibration's")
    statistics: str | None = Field(default=None, description="folder of `wtool calibrate`, in the place of text")
    parameters: OwnNumbers = OwnNumbers()


class RegMeanRecipe(BaseModel):
    """A merge by RegMean or RegMean++, as asked."""

    model_config = FROZEN

    merge_method: Literal["regmean", "regmean++"] = Field(description="how the models are merged")
    models: tuple[OwnModel, ...] = Field(min_length=1, description="the models to merge")
    parameters: Numbers = Numbers()
    calibration: Calibration = Calibration()
    dtype: str | None = Field(default=None, description="type of the output's weights; null keeps the inputs'")

    @property
    def weights(self) -> list[float]:
        return [entry.parameters.weight for entry in self.models]

    @property
    def output_dtype(self) -> str | None:
        """The type of the output's weights, by its safetensors name; None keeps the inputs'."""
        return parse_float_dtype(self.dtype) if self.dtype else None

    @property
    def takes_text(self) -> bool:
        """Whether the models are to be run on text."""
        return self.models[0].statistics is None

    def text_of(self, number: int) -> Calibration:
        """What a model is to be run on."""
        own = self.models[number].data
        return self.calibration.model_copy(update={"data": own}) if own else self.calibration

    def as_means(self) -> MergeRecipe:
        """The weighted mean of the same models, which what is no linear layer becomes."""
        models = [{"model": each.model, "parameters": {"weight": each.parameters.weight}} for each in self.models]
        content = {"merge_method": "linear", "models": models, "dtype": self.dtype}
        return parse_recipe(content, self.merge_method)

    @model_validator(mode="after")
    def _fits(self) -> "RegMeanRecipe":
        _ = self.output_dtype
        if not any(self.weights):
            raise UsageError("the weights of all models are 0; at least one must be above")
        given = sum(entry.statistics is not None for entry in self.models)
        if given and self.merge_method == "regmean++":
            raise UsageError("regmean++ runs text through the merged layers, so it cannot start from statistics")
        if given not in (0, len(self.models)):
            raise UsageError(
                f"statistics are given for {given} of {len(self.models)} models; give them for all or none"
            )
        return self


def of_file(path: Path) -> RegMeanRecipe | None:
    """The recipe in a file; None where it is one of another method, or none at all.

    raises: UsageError
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # whoever reads recipes of other methods tells what is wrong
    content = documents[0] if len(documents) == 1 else None
    if not isinstance(content, dict) or content.get("merge_method") not in ON_INPUTS:
        return None
    return parsed(RegMeanRecipe, content, str(path))


def of_flags(
    method: str,
    models: Sequence[str],
    *,
    weight: Sequence[float],
    data: Sequence[str],
    statistics: Sequence[str],
    calibration: Mapping[str, Any],
    parameters: Mapping[str, Any],
    dtype: str | None,
) -> RegMeanRecipe:
    """The recipe of a command line; weight, data and statistics are given once for all models or once a model.

    raises: UsageError
    """
    if statistics and (data or calibration):
        raise UsageError("--stats takes the place of text: leave out --calib and what goes with it")
    if len(statistics) not in (0, len(models)):
        raise UsageError(f"--stats is given {len(statistics)} times for {len(models)} models; give it once a model")
    factors = _each("--weight", weight, len(models))
    texts = _each("--calib", data, len(models))
    entries: list[dict[str, Any]] = [{"model": model} for model in models]
    for number, entry in enumerate(entries):
        entry |= {"parameters": {"weight": factors[number]}} if factors else {}
        entry |= {"data": (texts[number],)} if texts else {}
        entry |= {"statistics": statistics[number]} if statistics else {}
    content = {"merge_method": method, "models": entries, "parameters": dict(parameters)}
    content |= {"calibration": dict(calibration), "dtype": dtype}
    return parsed(RegMeanRecipe, content, "command line")


def _each(option: str, values: Sequence[Any], count: int) -> Sequence[Any]:
    if len(values) == 1:
        return [values[0]] * count
    if values and len(values) != count:
        raise UsageError(f"{option} is given {len(values)} times for {count} models; give it once, or once a model")
    return values
