"""Making matrices sparse or thin on the walk."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wtool.dtypes import torch_dtype
from wtool.rewrite import Change, Made
from wtool.statistics import Gram, Moments

from .layers import Layer
from .matrix import Fed, Pruned, explain, fed, sparse, thin
from .recipe import METHODS, PruneRecipe


@dataclass(frozen=True)
class Sparsifying(Change[Gram | Moments]):
    """Prunes linears as a plan says."""

    recipe: PruneRecipe
    layers: Mapping[str, Layer]

    def outputs(self, tensor: str) -> Collection[str]:
        return self.layers[tensor].outputs.keys() if tensor in self.layers else ()

    def gather(self, features: int, device: torch.device) -> Gram | Moments:
        assert self.recipe.method is not None
        if METHODS[self.recipe.method].gathers == "gram":
            return Gram(features, device, lifted=self.recipe.lifts)
        return Moments(features, device)

    def site(self, tensors: Sequence[str], weights: Sequence[Tensor], gathered: Gram | Moments) -> Sequence[Made]:
        inputs = fed(gathered)
        return [self._made(name, weight, inputs) for name, weight in zip(tensors, weights, strict=True)]

    def unseen(self, tensor: str, weight: Tensor, why: str) -> Made:
        return self._made(tensor, weight, Fed())

    def decode(self, tensor: str, written: Mapping[str, Tensor]) -> Tensor:
        return self.layers[tensor].decode(written)

    def _made(self, name: str, weight: Tensor, inputs: Fed) -> Made:
        layer = self.layers[name]
        pruned = prune(weight, inputs, layer, self.recipe)
        return Made(pruned.weight, partial(layer.encode, pruned), partial(explain, pruned=pruned, inputs=inputs))


def prune(weight: Tensor, inputs: Fed, layer: Layer, recipe: PruneRecipe) -> Pruned:
    """A matrix [out, in] as it will be stored, in the type of its tensor."""
    exact = weight.to(torch_dtype(layer.dtype))
    if layer.asked is not None:
        return sparse(exact, inputs, layer.asked, recipe, torch_dtype(layer.scale_dtype))
    return thin(exact, inputs, layer.rank)
