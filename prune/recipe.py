"""A pruning, as asked: one frozen object, validated once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wtool import recipe_file
from wtool.errors import UsageError
from wtool.grid import BITS, Grid
from wtool.recipe_file import parsed
from wtool.recipe_parts import Calibration, known, one_of

from .pattern import Sparsity, parse_pattern

Kind = Literal["structure", "sparsity", "rank"]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods that change matrices one by one."""

    summary: str
    kind: Kind
    gathers: Literal["nothing", "moments", "gram"]  # of each linear's inputs, on calibration text


METHODS: dict[str, Method] = {
    "magnitude": Method("drop the weights nearest to zero", "sparsity", "nothing"),
    "wanda": Method("drop the lowest weight times input norm of every row", "sparsity", "moments"),
    "ria": Method("drop what matters least beside the others of its row and column", "sparsity", "moments"),
    "sparsegpt": Method("drop column by column, later columns make up for it", "sparsity", "gram"),
    "svd": Method("the product of two thin matrices nearest to the weights", "rank", "nothing"),
    "svd-llm": Method("the product of two thin matrices with the nearest outputs", "rank", "gram"),
}
DEPTH_SCORES: dict[str, str] = {
    "perplexity": "take out the layer without which the loss on calibration text rises least, again and again",
    "block-influence": "take out the layers that turn their input least",
    "angular": "take out the run of layers over which the last token turns least",
    "last": "take out the layers before the last one",
}
EXPERT_SCORES: dict[str, str] = {
    "reap": "mean router weight times length of the expert's output, over the tokens routed to it",
    "frequency": "how many tokens are routed to it",
}
SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "experts", "expert_ffn")
BUDGETS = ("params", "size", "latency_ratio")  # sizes are found for one of them


class PruneRecipe(BaseModel):
    """A pruning, as asked: of the structure, or of matrices by a method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="checkpoint to prune: folder, file or Hub id")
    # structure: how much stays
    layers: int | tuple[int, ...] | None = Field(
        default=None, description="structure: layers to keep, how many or which by their numbers from 0"
    )
    hidden: int | None = Field(default=None, ge=1, description="structure: channels of the residual stream to keep")
    ffn: int | None = Field(default=None, ge=1, description="structure: channels of each feed-forward block to keep")
    heads: int | None = Field(default=None, ge=1, description="structure: query heads to keep")
    kv_heads: int | None = Field(
        default=None, ge=1, description="structure: key-value heads to keep, with their query heads"
    )
    experts: int | None = Field(default=None, ge=1, description="structure: experts of each layer to keep")
    expert_ffn: int | None = Field(default=None, ge=1, description="structure: channels inside each expert to keep")
    params: int | None = Field(default=None, ge=1, description="structure: find sizes with at most so many parameters")
    size: int | None = Field(
        default=None, ge=1, description="structure: find sizes whose weights take at most so many bytes"
    )
    latency_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="structure: find sizes with at most that share of the weights a token is multiplied with",
    )
    depth_score: str = Field(
        default="perplexity", description="which layers go", json_schema_extra=one_of(DEPTH_SCORES)
    )
    expert_score: str = Field(default="reap", description="which experts go", json_schema_extra=one_of(EXPERT_SCORES))
    compensate: bool = Field(default=True, description="fit what reads pruned channels to what is left of them")
    rescale_norms: bool = Field(default=True, description="after hidden channels went")
    rotate: bool = Field(
        default=False, description="the residual stream into its principal directions, before hidden channels go"
    )
    # matrices
    method: str | None = Field(
        default=None,
        description="of pruning matrices one by one; null prunes the structure",
        json_schema_extra=one_of(METHODS, None),
    )
    sparsity: float | None = Field(default=None, description="share of the weights to drop, in [0, 1)")
    pattern: str | None = Field(default=None, description="N:M, N kept of every M neighbours")
    layer_ratios: Literal["uniform", "owl", "by-shape"] = Field(
        default="uniform", description="how the sparsity is shared out over the layers"
    )
    owl_times_mean: float = Field(
        default=5.0, ge=1, description="owl's M: scores that many times their mean are outliers"
    )
    owl_spread: float = Field(
        default=0.08, ge=0, le=0.5, description="owl's λ: sparsities of blocks differ by at most twice as much"
    )
    rank_ratio: float | None = Field(default=None, description="share of a matrix's parameters to keep, in (0, 1]")
    ranks: Literal["uniform", "energy"] = Field(
        default="energy", description="how ranks are shared out over the matrices"
    )
    factors: bool = Field(default=True, description="store the thin matrices; otherwise their product")
    bits: int | None = Field(
        default=None,
        description="sparsegpt: round what stays as well, stored as compressed-tensors",
        json_schema_extra=one_of(BITS, None),
    )
    group_size: int = Field(default=128, description="input features that share a scale; -1 is a whole row")
    symmetric: bool = Field(default=True, description="without zero points")
    damping: float = Field(
        default=0.01, gt=0, le=1, description="share of the mean of the Gram matrix's diagonal to add to it"
    )
    lift: bool = Field(
        default=True,
        description="sparsegpt, svd-llm: short tokens, the first of a window above all, count like longer ones",
    )
    pack: bool = Field(
        default=False, description="a bit for every weight and the ones that stay, in the place of zeros"
    )
    ignore: tuple[str, ...] = Field(default=(), description="filters of modules to leave as they are")
    way: Literal["sequential", "one-pass"] = Field(
        default="sequential",
        description="fit each linear to what the pruned ones before it feed it, or all of a block to what that is fed",
    )
    calibration: Calibration = Field(default=Calibration(), description="the text that inputs are gathered from")
    statistics: str | None = Field(
        default=None, description="folder that `wtool calibrate` made, in the place of calibration text"
    )

    @property
    def kind(self) -> Kind:
        return "structure" if self.method is None else METHODS[self.method].kind

    @property
    def by_text(self) -> bool:
        """Whether it takes text to tell what of the structure stays."""
        widths = any(getattr(self, name) is not None for name in (*SIZES[1:], *BUDGETS))
        return widths or self.rotate or (isinstance(self.layers, int) and self.depth_score != "last")

    @property
    def searches(self) -> bool:
        """Whether sizes are to be found for a budget."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def by_inputs(self) -> bool:
        """Whether a method looks at more than weights."""
        assert self.method is not None
        return METHODS[self.method].gathers != "nothing" or self.layer_ratios == "owl"

    @property
    def lifts(self) -> bool:
        """Whether Gram matrices are of lifted tokens (`wtool.statistics.lifts`)."""
        return self.lift and self.method is not None and METHODS[self.method].gathers == "gram"

    @property
    def grid(self) -> Grid | None:
        """What the weights that stay are rounded to."""
        return None if self.bits is None else Grid(self.bits, self.group_size, self.symmetric)

    @property
    def asked(self) -> Sparsity:
        """How much of a matrix is to be dropped."""
        return parse_pattern(self.pattern) if self.pattern else Sparsity(share=self.sparsity)

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str | None) -> str | None:
        return name if name is None else known("pruning method", name, METHODS)

    @field_validator("depth_score")
    @classmethod
    def _known_depth_score(cls, name: str) -> str:
        return known("score of layers", name, DEPTH_SCORES)

    @field_validator("expert_score")
    @classmethod
    def _known_expert_score(cls, name: str) -> str:
        return known("score of experts", name, EXPERT_SCORES)

    @model_validator(mode="after")
    def _fits_together(self) -> "PruneRecipe":
        if self.rotate and self.hidden is None:
            raise UsageError("'rotate' turns the residual stream so that its last directions can go: give 'hidden' too")
        budgets = [f"'{name}'" for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise UsageError(f"{budgets[0]} and {budgets[1]} are two budgets for the sizes to find: give one of them")
        sizes = [key for key in (*SIZES, *BUDGETS) if getattr(self, key) is not None]
        amounts = [key for key in ("sparsity", "pattern", "rank_ratio") if getattr(self, key) is not None]
        if self.method is None:
            if amounts:
                raise UsageError(f"'{amounts[0]}' needs a method: one of {', '.join(METHODS)}")
            if self.statistics is not None:
                raise UsageError("statistics are for methods: which sizes to keep is found on calibration text")
            if not sizes:
                every = f"{', '.join((*SIZES, *BUDGETS[:-1]))} or {BUDGETS[-1]}"
                raise UsageError(f"what is to go? give sizes to keep ({every}), or a method")
            return self
        if sizes:
            raise UsageError(f"'{sizes[0]}' and method '{self.method}' are two prunings: do one after the other")
        wanted = ("rank_ratio",) if self.kind == "rank" else ("sparsity", "pattern")
        if len(amounts) != 1 or amounts[0] not in wanted:
            raise UsageError(
                f"method '{self.method}' takes {' or '.join(wanted)}, one of them; found {amounts or 'none'}"
            )
        if self.kind == "sparsity":
            return self._sparsity_fits()
        if not 0 < (self.rank_ratio or 0) <= 1:
            raise UsageError(
                f"rank ratio {self.rank_ratio:g} is not a share of the parameters to keep, above 0 and at most 1"
            )
        return self

    def _sparsity_fits(self) -> "PruneRecipe":
        _ = self.asked
        if self.bits is not None and self.method != "sparsegpt":
            raise UsageError(f"bits go together with sparsegpt alone; prune by {self.method}, then `wtool quantize`")
        if self.bits is not None and self.bits not in BITS:
            raise UsageError(f"bits is {self.bits}; there are {', '.join(map(str, BITS))}")
        if self.bits is not None and self.pack:
            raise UsageError("weights are packed as codes already where bits are given: leave out pack")
        if self.pattern and self.layer_ratios != "uniform":
            raise UsageError(f"layer ratios '{self.layer_ratios}' move a share of weights, and a pattern has none")
        return self


def parse_recipe(content: Any, where: str) -> PruneRecipe:
    """Validate a recipe, as YAML gives it. raises: UsageError, with the key and what would be right"""
    return parsed(PruneRecipe, content, where)


def read_recipe(path: Path) -> PruneRecipe:
    """Read a recipe file (YAML). raises: UsageError"""
    return recipe_file.read_recipe(PruneRecipe, path, "prune")
