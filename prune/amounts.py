"""How much each matrix can lose, as the dense model tells: one run on calibration text that changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wtool.block_pass import Site, Visitor
from wtool.checkpoint import Checkpoint
from wtool.finite import refuse_nonfinite
from wtool.network import Block, Linear, Network, Read
from wtool.statistics import Gram, Moments
from wtool.statistics_folder import Statistics

from .layers import Layer, blocks_of, layers_to_prune
from .lowrank import allocate, spectrum
from .matrix import Fed, fed, of_gram
from .owl import outlier_share, owl_shares
from .planner import Found
from .recipe import METHODS, PruneRecipe

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows

    from .run import Start


def by_outliers(
    recipe: PruneRecipe,
    source: Checkpoint,
    statistics: Statistics | None,
    windows: "Windows | None",
    where: "Where",
    start: "Start",
) -> Found:
    """Shares of OWL."""
    layers, _ = layers_to_prune(recipe, source)
    norms: dict[str, Tensor] = {}

    def look(name: str, weight: Tensor, inputs: Fed) -> None:
        if inputs.norm is not None:
            norms[name] = inputs.norm

    _look(recipe, source, layers, statistics, windows, where, start, Moments, look)
    blocks = blocks_of(layers)
    weights = {name: layer.linear.shape[0] * layer.linear.shape[1] for name, layer in layers.items()}
    found: dict[int, float] = {}
    for number, names in blocks.items():
        met = [name for name in names if name in norms]
        matrices = [_matrix(source, layers[name]) for name in met]
        found[number] = outlier_share(matrices, [norms[name] for name in met], times_mean=recipe.owl_times_mean)
    shares = owl_shares(
        [found[number] for number in blocks],
        [sum(weights[name] for name in names) for names in blocks.values()],
        recipe.asked.nominal,
        spread=recipe.owl_spread,
    )
    by_block = dict(zip(blocks, (round(share, 9) for share in shares), strict=True))
    about = {"outliers": {str(k): v for k, v in found.items()}, "sparsity": {str(k): v for k, v in by_block.items()}}
    return Found(shares={name: by_block[number] for number, names in blocks.items() for name in names}, about=about)


def by_energy(
    recipe: PruneRecipe,
    source: Checkpoint,
    statistics: Statistics | None,
    windows: "Windows | None",
    where: "Where",
    start: "Start",
) -> Found:
    """Ranks that spend the parameters where they hold the most energy of the outputs (or of the weights, for svd)."""
    layers, _ = layers_to_prune(recipe, source)
    energies: dict[str, Tensor] = {}

    def look(name: str, weight: Tensor, inputs: Fed) -> None:
        energies[name] = spectrum(weight, inputs.gram).energies

    assert recipe.method is not None and recipe.rank_ratio is not None
    if METHODS[recipe.method].gathers == "nothing":
        for name, layer in layers.items():
            look(name, _matrix(source, layer), Fed())
    else:
        kind = partial(Gram, lifted=recipe.lifts)
        _look(recipe, source, layers, statistics, windows, where, start, kind, look)
    for name in layers.keys() - energies.keys():
        look(name, _matrix(source, layers[name]), Fed())
    shapes = {name: layer.linear.shape for name, layer in layers.items()}
    ranks = allocate(energies, shapes, recipe.rank_ratio, relative=True)
    return Found(ranks=ranks, about={"ranks": ranks})


Look = Callable[[str, Tensor, Fed], None]


def _look(
    recipe: PruneRecipe,
    source: Checkpoint,
    layers: Mapping[str, Layer],
    statistics: Statistics | None,
    windows: "Windows | None",
    where: "Where",
    start: "Start",
    kind: Callable[..., Any],
    look: Look,
) -> None:
    """Show every matrix with what is known of its inputs, from saved statistics or by running the model."""
    if statistics is not None:
        for name, layer in layers.items():
            if (met := statistics.inputs.get(name)) is not None:
                gram = statistics.matrices.read(met.linears[0])
                look(name, _matrix(source, layer), of_gram(gram, met.tokens, met.dropped))
        return
    from wtool import calibrate

    assert windows is not None, "the recipe asks for calibration"
    network = calibrate.network(source, where)
    visitor = _Looking(network, layers, kind, look)
    calibrate.walk(
        network,
        windows.unpadded(),
        visitor,
        way="observe",
        where=where,
        start=lambda steps: start("looking at the model", steps),
    )


class _Looking(Visitor[Any]):
    """Shows, and changes nothing."""

    def __init__(self, network: Network, layers: Mapping[str, Layer], kind: Callable[..., Any], look: Look):
        self._network, self._layers, self._kind, self._look = network, layers, kind, look

    def written(self, block: Block) -> Read | None:
        return None

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> Any:
        return self._kind(features, device) if any(linear.name in self._layers for linear in linears) else None

    def site(self, site: Site[Any]) -> Mapping[Linear, Tensor]:
        inputs = fed(site.gathered)
        for linear in site.linears:
            if linear.name in self._layers:
                self._look(linear.name, self._network.view(linear), inputs)
        return {}

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        return {}


def _matrix(source: Checkpoint, layer: Layer) -> Tensor:
    stored = source.read(layer.linear.tensor)
    refuse_nonfinite(stored, f"tensor '{layer.linear.tensor}'")
    return stored.T if layer.linear.transposed else stored
