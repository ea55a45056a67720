"""Which matrices of a checkpoint are pruned, how much of each, and how the result lies on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from wtool.checkpoint import Checkpoint, TensorInfo
from wtool.formats import FORMATS, Scheme, bitmask, low_rank
from wtool.linear_names import LAYER, LinearLayer, linear_layers
from wtool.recipe_parts import fits

from .lowrank import rank_of
from .matrix import Pruned
from .owl import even_by_shape
from .pattern import Sparsity
from .recipe import PruneRecipe

Form = Literal["plain", "bitmask", "factors", "codes"]
CODES = FORMATS["compressed-tensors"]


@dataclass(frozen=True)
class Layer:
    """A linear layer and what becomes of it."""

    linear: LinearLayer
    dtype: str  # safetensors name
    form: Form
    asked: Sparsity | None = None  # of a sparse one
    rank: int | None = None  # of a thin one; None where it stays as it is
    by_row: bool = False  # as many are dropped of every row
    scheme: Scheme | None = None  # of one that is rounded too

    @property
    def scale_dtype(self) -> str:
        return CODES.scale_dtype(self.dtype)

    @property
    def stored(self) -> tuple[int, int]:
        """The shape in which it lies."""
        rows, columns = self.linear.shape
        return (columns, rows) if self.linear.transposed else (rows, columns)

    @property
    def kept(self) -> int:
        """How many weights of it stay."""
        rows, columns = self.linear.shape
        return rows * columns - (self.asked.dropped(rows, columns, by_row=self.by_row) if self.asked else 0)

    @property
    def outputs(self) -> dict[str, TensorInfo]:
        """The tensors in the place of its weight."""
        if self.form == "plain":
            return {self.linear.tensor: TensorInfo(self.dtype, self.stored)}
        if self.form == "codes":
            assert self.scheme is not None
            infos = CODES.layout(self.linear.shape, self.scheme, self.scale_dtype)
        elif self.form == "bitmask":
            infos = bitmask.layout(self.stored, self.kept, self.dtype)
        else:
            assert self.rank is not None
            infos = low_rank.layout(self.stored, self.rank, self.dtype)
        return {f"{self.linear.module}.{suffix}": info for suffix, info in infos.items()}

    def encode(self, pruned: Pruned) -> dict[str, Tensor]:
        """What is written in its place, by names."""
        weight = self._turned(pruned.weight)
        if self.form == "plain":
            return {self.linear.tensor: weight.contiguous().cpu()}
        if self.form == "codes":
            assert pruned.quantized is not None and self.scheme is not None
            parts = {name: part.cpu() for name, part in CODES.encode(pruned.quantized, self.scheme).items()}
        elif self.form == "bitmask":
            assert pruned.keep is not None
            parts = bitmask.pack(weight.cpu(), self._turned(pruned.keep).cpu())
        else:
            assert pruned.factors is not None
            u, v = pruned.factors.u, pruned.factors.v
            u, v = (v.T, u.T) if self.linear.transposed else (u, v)
            parts = {low_rank.U: u.contiguous().cpu(), low_rank.V: v.contiguous().cpu()}
        return {f"{self.linear.module}.{suffix}": tensor for suffix, tensor in parts.items()}

    def decode(self, written: Mapping[str, Tensor]) -> Tensor:
        """The matrix [out, in] again."""
        if self.form == "plain":
            return self._turned(written[self.linear.tensor])
        prefix = f"{self.linear.module}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in written.items()}
        if self.form == "codes":
            assert self.scheme is not None
            return CODES.decode(parts, self.scheme, self.linear.shape).values()
        return self._turned(bitmask.unpack(parts) if self.form == "bitmask" else low_rank.multiply(parts))

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.linear.transposed else matrix


def layers_to_prune(
    recipe: PruneRecipe,
    source: Checkpoint,
    shares: Mapping[str, float] | None = None,
    ranks: Mapping[str, int | None] | None = None,
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The matrices to prune by their tensors, and why the others stay.

    shares: of the weights of each to drop, where the recipe alone does not tell
    ranks:  of each, likewise
    """
    found, left = linear_layers(source)
    ignored = {name for name, linear in found.items() if any(fits(entry, linear.module) for entry in recipe.ignore)}
    left |= dict.fromkeys(ignored, "ignored, as asked")
    linears = {name: linear for name, linear in found.items() if name not in ignored}
    if recipe.kind == "rank":
        return _thin(recipe, source, linears, ranks), left
    if shares is None and recipe.layer_ratios == "by-shape":
        even = even_by_shape([linear.shape for linear in linears.values()], recipe.asked.nominal)
        shares = dict(zip(linears, even, strict=True))
    return _sparse(recipe, source, linears, shares), left


def _sparse(
    recipe: PruneRecipe, source: Checkpoint, linears: Mapping[str, LinearLayer], shares: Mapping[str, float] | None
) -> dict[str, Layer]:
    form: Form = "codes" if recipe.grid else "bitmask" if recipe.pack else "plain"
    scheme = Scheme(recipe.grid) if recipe.grid else None
    layers: dict[str, Layer] = {}
    for name, linear in linears.items():
        asked = recipe.asked if shares is None else Sparsity(share=shares[name])
        by_row = recipe.method == "wanda"
        layers[name] = Layer(linear, source.tensors[name].dtype, form, asked, by_row=by_row, scheme=scheme)
    return layers


def _thin(
    recipe: PruneRecipe,
    source: Checkpoint,
    linears: Mapping[str, LinearLayer],
    ranks: Mapping[str, int | None] | None,
) -> dict[str, Layer]:
    assert recipe.rank_ratio is not None
    layers: dict[str, Layer] = {}
    for name, linear in linears.items():
        rank = ranks[name] if ranks else rank_of(linear.shape, recipe.rank_ratio)
        form: Form = "plain" if rank is None or not recipe.factors else "factors"
        layers[name] = Layer(linear, source.tensors[name].dtype, form, rank=rank)
    return layers


def blocks_of(layers: Mapping[str, Layer]) -> dict[int, list[str]]:
    """The tensors of each block, by its number."""
    blocks: dict[int, list[str]] = {}
    for name in layers:
        match = LAYER.match(name)
        assert match is not None, "a linear layer has a number"
        blocks.setdefault(int(match[2]), []).append(name)
    return blocks
