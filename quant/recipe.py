"""A quantization, as asked: one frozen object, validated once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wtool import recipe_file
from wtool.errors import UsageError
from wtool.grid import BITS, Grid
from wtool.recipe_file import parsed
from wtool.recipe_parts import Calibration, fits, known

FORMATS = ("compressed-tensors", "gptq", "gptq_v2")
TARGETS = ("transformers", "vllm", "gptqmodel", "autogptq")


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    summary: str
    calibrated: bool = False  # needs calibration text, or statistics gathered from it


METHODS: dict[str, Method] = {
    "rtn": Method("round to the nearest code, checkpoint to checkpoint"),
    "gptq": Method("column by column, later columns make up for the errors of earlier ones", calibrated=True),
}


class Override(BaseModel):
    """Another grid for some linears; what is not given is the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filter: str  # a part of the module's name, or a regular expression after "re:"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


class QuantRecipe(BaseModel):
    """A quantization, as asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str = "gptq"
    bits: int = 4
    group_size: int = 128  # input features that share a scale; -1 is a whole row
    symmetric: bool = True
    format: str = "compressed-tensors"
    target: str | None = None
    tensor_parallel: int = Field(default=1, ge=1)
    ignore: tuple[str, ...] = ()  # filters of modules to leave as they are
    overrides: tuple[Override, ...] = ()  # the first that fits counts
    calibration: Calibration = Calibration()
    statistics: str | None = None  # a folder that `wtool calibrate` made, in the place of calibration text
    damping: float = Field(default=0.01, gt=0, le=1)  # share of the mean of the Gram matrix's diagonal
    act_order: bool = True
    static_groups: bool = True
    clip: bool = True
    refine: int = Field(default=1, ge=0)  # times to go over codes and scales again
    dtype: str | None = None  # of what is not quantized, and of scales; None is the model's
    way: Literal["sequential", "one-pass"] = "sequential"

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def grid_of(self, module: str) -> Grid | None:
        """The grid of a module; None where it is to be left as it is."""
        if any(fits(entry, module) for entry in self.ignore):
            return None
        own = next((entry for entry in self.overrides if fits(entry.filter, module)), None)
        if own is None:
            return self.grid
        return Grid(
            self.bits if own.bits is None else own.bits,
            self.group_size if own.group_size is None else own.group_size,
            self.symmetric if own.symmetric is None else own.symmetric,
        )

    @property
    def ordered(self) -> bool:
        """Whether groups are of columns in the order of their activations, which the file then has to tell."""
        return self.method == "gptq" and self.act_order and not self.static_groups

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return known("quantization method", name, METHODS)

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        return known("format", name, FORMATS)

    @field_validator("target")
    @classmethod
    def _known_target(cls, name: str | None) -> str | None:
        return name if name is None else known("target", name, TARGETS)

    @model_validator(mode="after")
    def _grids_fit(self) -> "QuantRecipe":
        for place, bits, size in [
            ("", self.bits, self.group_size),
            *((f" for '{entry.filter}'", entry.bits, entry.group_size) for entry in self.overrides),
        ]:
            if bits is not None and bits not in BITS:
                raise UsageError(f"bits{place} is {bits}; there are {', '.join(map(str, BITS))}")
            if size is not None and size != -1 and size < 1:
                raise UsageError(f"group size{place} is {size}; give a number of input features, or -1 for whole rows")
        return self


def parse_recipe(content: Any, where: str) -> QuantRecipe:
    """Validate a recipe, as YAML gives it. raises: UsageError, with the key and what would be right"""
    return parsed(QuantRecipe, content, where)


def read_recipe(path: Path) -> QuantRecipe:
    """Read a recipe file (YAML). raises: UsageError"""
    return recipe_file.read_recipe(QuantRecipe, path, "quantize")
