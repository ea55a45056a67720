"""A quantization, as asked: one frozen object, validated once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict

from wtool import recipe_file
from wtool.errors import UsageError
from wtool.formats.fp8 import SCHEMES
from wtool.grid import BITS, Grid
from wtool.recipe_file import parsed
from wtool.recipe_parts import Calibration, fits, known, one_of

from .gguf_types import DEFAULT_TYPE, MIXTURES

FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "gguf")
OF_GGUF = {"model", "format", "type", "statistics", "rotate", "rotate_seed"}  # what a recipe of a GGUF file can tell
# what a recipe of FP8 can tell
OF_FP8 = {"model", "method", "scheme", "format", "target", "tensor_parallel", "ignore", "dtype"}
TARGETS = ("transformers", "vllm", "gptqmodel", "autogptq")


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    summary: str
    calibrated: bool = False  # needs calibration text, or statistics gathered from it
    scaled: bool = False  # blocks are scaled first, which needs the text
    learned: bool = False  # by gradients through whole blocks, which needs the text
    asymmetric: bool = False  # the model as it was runs beside, which needs the text
    compensating: bool = False  # the weights of a row make up for one another's errors
    symmetric: bool = True  # the grid, where none is asked for


METHODS: dict[str, Method] = {
    "rtn": Method("round to the nearest code, checkpoint to checkpoint"),
    "gptq": Method(
        "column by column, later columns make up for the errors of earlier ones", calibrated=True, compensating=True
    ),
    "gptaq": Method(
        "gptq that aims at the outputs the linear had before anything was quantized",
        calibrated=True,
        asymmetric=True,
        compensating=True,
    ),
    "awq": Method("round inputs scaled up where activations are large", calibrated=True, scaled=True, symmetric=False),
    "signround": Method(
        "codes and scales of a whole block learned by gradients of its outputs",
        calibrated=True,
        learned=True,
        compensating=True,
    ),
    "awq+gptq": Method(
        "the scales of awq, then gptq", calibrated=True, scaled=True, compensating=True, symmetric=False
    ),
    "awq+signround": Method(
        "the scales of awq, then signround",
        calibrated=True,
        scaled=True,
        learned=True,
        compensating=True,
        symmetric=False,
    ),
}


NO_GRID = {"not": one_of(bits for bits in range(BITS[0], BITS[-1]) if bits not in BITS)}  # JSON knows no 7 but 7.0
Average = Annotated[float, Field(ge=BITS[0], le=BITS[-1], json_schema_extra=cast(JsonDict, NO_GRID))]
Bits = Annotated[int, Field(json_schema_extra=one_of(BITS))] | Average


class Override(BaseModel):
    """Another grid for some linears; what is not given is the recipe's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filter: str = Field(description="a part of the module's name, or a regular expression after 're:'")
    bits: int | None = Field(default=None, description="of a weight", json_schema_extra=one_of(BITS, None))
    group_size: int | None = Field(default=None, description="input features that share a scale; -1 is a whole row")
    symmetric: bool | None = Field(default=None, description="without zero points")


class QuantRecipe(BaseModel):
    """A quantization, as asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="checkpoint to quantize: folder, file or Hub id")
    method: str = Field(default="gptq", description="how codes are found", json_schema_extra=one_of(METHODS))
    bits: Bits = Field(default=4, description="of a weight; with a point, as 3.5, an average to be spread over layers")
    target_size: str | None = Field(default=None, description="of all weights on disk, as 4GB, in the place of bits")
    candidates: tuple[str, ...] = Field(
        default=(), description="what layers may get where bits are spread: 4, or 4/32 for groups of 32; none: all bits"
    )
    group_size: int = Field(default=128, description="input features that share a scale; -1 is a whole row")
    symmetric: bool = Field(default=True, description="without zero points; AWQ has them unless told otherwise")
    format: str = Field(
        default="compressed-tensors", description="how codes lie on disk", json_schema_extra=one_of(FORMATS)
    )
    type: str | None = Field(
        default=None, description="of a GGUF file's weights; null is Q4_K_M", json_schema_extra=one_of(MIXTURES, None)
    )
    scheme: str | None = Field(
        default=None, description="FP8 in the place of codes, and its scales", json_schema_extra=one_of(SCHEMES, None)
    )
    target: str | None = Field(
        default=None, description="refuse what this runtime cannot load", json_schema_extra=one_of(TARGETS, None)
    )
    tensor_parallel: int = Field(default=1, ge=1, description="devices that the target splits layers over")
    ignore: tuple[str, ...] = Field(default=(), description="filters of modules to leave as they are")
    overrides: tuple[Override, ...] = Field(
        default=(), description="other grids for some modules; the first that fits counts"
    )
    calibration: Calibration = Field(default=Calibration(), description="the text that inputs are gathered from")
    statistics: str | None = Field(
        default=None, description="folder that `wtool calibrate` made, in the place of calibration text"
    )
    rotate: Literal["none", "residual", "residual+values"] = Field(
        default="none", description="what is turned by Hadamard matrices first, so that weights have no outliers"
    )
    rotate_seed: int = Field(default=0, ge=0, description="of the signs of those matrices")
    damping: float = Field(
        default=0.01, gt=0, le=1, description="share of the mean of the Gram matrix's diagonal to add to it"
    )
    lift: bool = Field(
        default=True,
        description="short tokens, the first of a window above all, count like longer ones; not in learned rounding",
    )
    act_order: bool = Field(default=True, description="columns in the order of their activations")
    static_groups: bool = Field(default=True, description="scales from the weights as they were")
    clip: bool = Field(default=True, description="search how much of each range to cover")
    iters: int = Field(default=50, ge=1, description="steps that the rounding of a block is learned in")
    batch: int = Field(default=8, ge=1, description="windows that each of them is learned from")
    lr: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="of the first step, in steps of the grid; null: 1 / iters, at most 1/20",
    )
    refine: int = Field(default=1, ge=0, description="times to go over codes and scales again")
    dtype: str | None = Field(
        default=None, description="type of what is not quantized, and of scales; null is the model's"
    )
    way: Literal["sequential", "one-pass"] = Field(
        default="sequential",
        description="fit each linear to what the quantized ones before it feed it, or to the model as it was",
    )

    @property
    def allocates(self) -> bool:
        """Whether each layer is to get the grid that serves a budget best; `quant.allocated` settles which."""
        return self.target_size is not None or isinstance(self.bits, float)

    @property
    def lifts(self) -> bool:
        """Whether Gram matrices are of lifted tokens; what is learned has a loss of its own."""
        return self.lift and not METHODS[self.method].learned

    @property
    def grid(self) -> Grid:
        assert isinstance(self.bits, int), "bits were settled"
        return Grid(self.bits, self.group_size, self.symmetric)

    def grid_of(self, module: str) -> Grid | None:
        """The grid of a module; None where it is to be left as it is."""
        if any(fits(entry, module) for entry in self.ignore):
            return None
        own = next((entry for entry in self.overrides if fits(entry.filter, module)), None)
        if own is None:
            return self.grid
        return Grid(
            self.grid.bits if own.bits is None else own.bits,
            self.group_size if own.group_size is None else own.group_size,
            self.symmetric if own.symmetric is None else own.symmetric,
        )

    @property
    def ordered(self) -> bool:
        """Whether groups are of columns in the order of their activations, which the file then has to tell."""
        return self.method in ("gptq", "gptaq", "awq+gptq") and self.act_order and not self.static_groups

    @model_validator(mode="before")
    @classmethod
    def _usual_grid(cls, content: Any) -> Any:
        """The grid is the method's usual one where the recipe tells none."""
        if not isinstance(content, dict) or content.get("symmetric") is not None:
            return content
        method = METHODS.get(str(content.get("method")))
        return content if method is None or method.symmetric else {**content, "symmetric": False}

    @model_validator(mode="before")
    @classmethod
    def _usual_of_fp8(cls, content: Any) -> Any:
        """FP8 is rounded to; and the format of that name has blocks, where the recipe tells no scheme."""
        if not isinstance(content, dict) or (content.get("scheme") is None and content.get("format") != "fp8"):
            return content
        usual = {"method": "rtn", "scheme": "fp8-block" if content.get("format") == "fp8" else None}
        return {**content, **{key: value for key, value in usual.items() if content.get(key) is None}}

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

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, name: str | None) -> str | None:
        return name if name is None else known("scheme", name, SCHEMES)

    @model_validator(mode="after")
    def _scheme_fits(self) -> "QuantRecipe":
        if self.scheme is None:
            return self
        if self.method != "rtn":
            raise UsageError(f"scheme {self.scheme} goes with the method rtn, not with {self.method}")
        if others := [key for key in type(self).model_fields if key in self.model_fields_set - OF_FP8]:
            raise UsageError(f"'{others[0]}' does not go with the scheme {self.scheme}, which says all of its numbers")
        if self.format not in ("compressed-tensors", "fp8"):
            raise UsageError(
                f"scheme {self.scheme} goes with the formats compressed-tensors and fp8, not {self.format}"
            )
        if self.format == "fp8" and self.scheme == "fp8-dynamic":
            raise UsageError(
                "the format fp8 has no scales for rows: take the scheme fp8-block, or the format compressed-tensors"
            )
        return self

    @model_validator(mode="after")
    def _type_fits(self) -> "QuantRecipe":
        if self.format != "gguf":
            if self.type is not None:
                raise UsageError(f"type {self.type} is for the format gguf, not for {self.format}")
            return self
        known("GGUF type", self.type or DEFAULT_TYPE, MIXTURES)
        if others := [key for key in type(self).model_fields if key in self.model_fields_set - OF_GGUF]:
            cure = "gather statistics with `wtool calibrate` and give them with --stats"
            why = cure if others[0] == "calibration" else f"its type says all (there are {', '.join(MIXTURES)})"
            raise UsageError(f"'{others[0]}' does not go with the format gguf: {why}")
        return self

    @model_validator(mode="after")
    def _grids_fit(self) -> "QuantRecipe":
        for place, bits, size in [
            ("", self.bits, self.group_size),
            *((f" for '{entry.filter}'", entry.bits, entry.group_size) for entry in self.overrides),
        ]:
            if bits is not None and bits not in BITS and isinstance(bits, int):
                raise UsageError(f"bits{place} is {bits}; there are {', '.join(map(str, BITS))}")
            if size is not None and size != -1 and size < 1:
                raise UsageError(f"group size{place} is {size}; give a number of input features, or -1 for whole rows")
        return self

    @model_validator(mode="after")
    def _allocation_fits(self) -> "QuantRecipe":
        if not self.allocates:
            if self.candidates:
                raise UsageError("candidates are for an average of bits (--bits 3.5) or a --target-size; give one")
            return self
        asked = f"bits {self.bits}" if self.target_size is None else f"target size {self.target_size}"
        if self.target_size is not None and "bits" in self.model_fields_set:
            raise UsageError(f"target size {self.target_size} and bits {self.bits}: give one of them")
        if self.format != "compressed-tensors":
            raise UsageError(f"{asked} gives layers grids of their own: take the format compressed-tensors")
        if self.target == "transformers" and not self.symmetric:
            raise UsageError(f"{asked} gives layers grids of their own; transformers opens only --symmetric ones")
        for entry in self.overrides:
            if entry.bits is None:
                raise UsageError(f"the override for '{entry.filter}' has no bits, which it needs beside {asked}")
        return self

    @model_validator(mode="after")
    def _rotation_fits(self) -> "QuantRecipe":
        if self.rotate != "none" and self.statistics is not None:
            raise UsageError("rotate: statistics are of the model as it is, not rotated: give calibration text, or rtn")
        return self

    @model_validator(mode="after")
    def _asymmetric_is_sequential(self) -> "QuantRecipe":
        if METHODS[self.method].asymmetric and self.way == "one-pass":
            raise UsageError(f"{self.method} is sequential: leave out 'way: one-pass' (--no-sequential), or take gptq")
        return self

    @model_validator(mode="after")
    def _scales_need_the_model(self) -> "QuantRecipe":
        method = METHODS[self.method]
        if self.statistics is not None and (method.scaled or method.learned or method.asymmetric):
            raise UsageError(f"{self.method} looks at the model itself, so statistics do not do: give calibration text")
        return self


def parse_recipe(content: Any, where: str) -> QuantRecipe:
    """Validate a recipe, as YAML gives it. raises: UsageError, with the key and what would be right"""
    return parsed(QuantRecipe, content, where)


def read_recipe(path: Path) -> QuantRecipe:
    """Read a recipe file (YAML). raises: UsageError"""
    return recipe_file.read_recipe(QuantRecipe, path, "quantize")
