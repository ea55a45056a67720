"""AWQ on the walk: each block is looked at and scaled, then quantized as any other.

The scales of all matrices of a block are found from the block as it was, with what the quantized blocks before it feed
it. They are folded into its tensors, and the block is filled anew with these: what follows (rounding or GPTQ, true
sequential or in one pass) sees a block like any other that computes what it did. All tensors of a block are written by
the walk, as a norm may change too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wtool.block_pass import Forward, Site, Sites, Visitor, gathered_inputs
from wtool.dtypes import torch_dtype
from wtool.network import Block, Linear, Network, Read
from wtool.rewrite import Output, Rewriting
from wtool.statistics import Gram, Moments
from wtool.writer import checksum

from .awq import Fed, Found, search_scales
from .calibrated import Inputs, Quantizing
from .chains import Chain, chains
from .feeds import Feed, feeds
from .fold import Scaling, divided_norm, with_columns, with_rows
from .matrix import FEWEST_TOKENS

NOTHING = "nothing before it takes a scale"


@dataclass(frozen=True, kw_only=True)
class Seen(Inputs):
    """What is known of the input of a linear."""

    size: Tensor  # float32 [in], the mean of |x|


class GramAndSize(Gram):
    """A Gram matrix and the mean of |x|, as they grow."""

    def __init__(self, features: int, device: torch.device, *, lifted: bool):
        super().__init__(features, device, lifted=lifted)
        self._moments = Moments(features, device)

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        super().add(inputs, mask)
        self._moments.add(inputs, mask)

    def sums(self) -> list[Tensor]:
        return super().sums() + self._moments.sums()

    def seen(self) -> Seen:
        """What was seen; nothing can be added afterwards."""
        size, tokens, dropped = self._moments.mean_absolute, self.tokens, self.dropped
        return Seen(self.finish(), tokens, dropped, size=size)


class Looking(Visitor[GramAndSize]):
    """Gathers the inputs of some linears, and changes nothing."""

    def __init__(self, wanted: Collection[str], *, lifted: bool = False):
        self._wanted, self._lifted = wanted, lifted

    def written(self, block: Block) -> Read | None:
        return None

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> GramAndSize | None:
        wanted = any(linear.name in self._wanted for linear in linears)
        return GramAndSize(features, device, lifted=self._lifted) if wanted else None

    def site(self, site: Site[GramAndSize]) -> Mapping[Linear, Tensor]:
        return {}

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        return {}


class ScaledRewriting(Rewriting[Gram]):
    """The visitor of a walk that scales every block before it is quantized."""

    def __init__(self, change: Quantizing, network: Network, output: Output, transposed: Collection[str]):
        turned = {each.name for block in network.blocks for each in block.linears if each.slot.transposed}
        super().__init__(change, network, output, {*transposed, *turned})
        self._plan = plan = change.plan
        self._lifted = change.recipe.lifts
        outputs = plan.plan.outputs
        self._dtypes = {name: torch_dtype(outputs[name].dtype) for name in plan.walked}  # of what is written plain
        self._feeds: dict[Any, list[Feed]] = {}  # by kind of block
        self._scalings: dict[str, Scaling] = {}  # of matrices, and by their matrices' of biases
        self._norms: dict[str, Tensor] = {}
        self._scaled: dict[str, Mapping[str, Any]] = {}  # what the report tells

    # Scaling

    def prepare(self, forward: Forward, sites: Sites) -> Read | None:
        found = self.chains_of(forward)
        wanted = {taker.tensor for chain in found for taker in chain.takers if taker.tensor in self._plan.layers}
        gathered = gathered_inputs(replace(forward, visitor=Looking(wanted, lifted=self._lifted)), sites)
        seen: dict[str, Seen] = {}
        for site in gathered.sites():
            met = site.gathered.seen()
            seen |= {linear.name: met for linear in site.linears if linear.name in wanted}
        for chain in found:
            self.scale(chain, seen)
        return self.scaled_tensor

    def chains_of(self, forward: Forward) -> list[Chain]:
        """What can be scaled in a block."""
        return [chain for feed in self._feeds_of(forward) for chain in chains(forward.block, feed)]

    def _feeds_of(self, forward: Forward) -> list[Feed]:
        """The feeds of a block; blocks of one kind are alike, so one of each kind is tried."""
        name = f"{forward.block.name}."
        kind = tuple(
            (linear.shape, replace(linear.slot, parameter=linear.slot.parameter.removeprefix(name)))
            for linear in forward.block.linears
        )
        if kind not in self._feeds:
            self._feeds[kind] = feeds(forward)
        return self._feeds[kind]

    def scale(self, chain: Chain, seen: Mapping[str, Seen]) -> None:
        """Find the scales of a chain, and note what they make of its tensors.

        seen: of linears by their names
        """
        matrices = [
            self._fed(taker.linear, taker.channel, seen[taker.tensor])
            for taker in chain.takers
            if taker.linear is not None and taker.tensor in seen and seen[taker.tensor].tokens >= FEWEST_TOKENS
        ]
        if not matrices:
            return
        found = search_scales(matrices, chain.channels)
        scales = found.scales if found.is_identity else self._divide(chain, found.scales)
        for taker in chain.takers:
            self._scaled[taker.tensor] = _told(chain, found)
            if not found.is_identity:
                own = scales if taker.channel is None else scales[taker.channel]
                self._scalings[taker.tensor] = with_columns(self._scalings.get(taker.tensor, Scaling()), own)

    def _fed(self, linear: Linear, channel: Tensor | None, seen: Seen) -> Fed:
        layer = self._plan.layers[linear.name]
        weight = self._network.view(linear).float()
        dtype = torch_dtype(layer.scale_dtype)
        return Fed(weight, seen.gram, seen.size, seen.tokens, layer.scheme.grid, dtype, channel)

    def _divide(self, chain: Chain, scales: Tensor) -> Tensor:
        """Fold scales into what they come from; what they are when that is rounded."""
        if chain.norm is not None:
            weight = self._network.read(chain.norm).to(scales.device)
            changed, scales = divided_norm(weight, scales, self._dtypes[chain.norm], offset=chain.offset)
            self._norms[chain.norm] = changed.cpu()
            if chain.bias is not None:
                self._scalings[chain.bias] = Scaling(rows=scales)
            return scales
        for part in chain.rows:
            name, outputs = part.linear.name, part.linear.shape[0]
            own = scales[part.first : part.first + part.count]
            scaling = with_rows(self._scalings.get(name, Scaling()), part.begin, own, outputs)
            self._scalings[name] = scaling
            if chain.bias is not None:
                self._scalings[chain.bias] = Scaling(scaling.rows)
        return scales

    def columns_of(self, linear: Linear) -> Tensor | None:
        """What the columns of a linear are multiplied by, float32 [in]; None where they are as they were."""
        return self._scalings.get(linear.name, Scaling()).columns

    def scaled_tensor(self, name: str) -> Tensor:
        """A tensor of a block as it is after the scaling: what is written plain as it is written."""
        if name in self._norms:
            return self._norms[name]
        stored, scaling = self._network.read(name), self._scalings.get(name)
        if scaling is not None:
            vector = stored.ndim == 1
            stored = scaling.of_bias(stored) if vector else self._turned(name, scaling.of(self._turned(name, stored)))
        return stored.to(self._dtypes[name]).contiguous() if name in self._dtypes else stored

    def _given(self, name: str) -> Tensor:
        return self.scaled_tensor(name)

    def _explain(self, name: str, explain: Callable[[Tensor], Mapping[str, Any]]) -> Mapping[str, Any]:
        return {**super()._explain(name, explain), "scaled": self._scaled.get(name, NOTHING)}

    # Writing

    def written(self, block: Block) -> Read | None:
        plain = self._plain(block)
        return super().written(block) if all(name in self._before for name in plain) else None

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        values = super().block(block, unseen)
        self._writing += [self._write_plain_beside(name) for name in self._plain(block)]
        return values

    def finish(self, tensors: Collection[str]) -> None:
        super().finish(tensors)
        walked = {name for block in self._network.blocks for name in self._plain(block)}
        self._writing += [self._write_plain_beside(name) for name in self._dtypes if name not in walked]
        self._write_beside([])

    def _plain(self, block: Block) -> list[str]:
        """The tensors of a block that are written as what they are."""
        return [name for group in block.groups for name in group.sources if name in self._dtypes]

    def _write_plain_beside(self, name: str) -> Future[None]:
        return self._beside.submit(self._write_plain, name)

    def _write_plain(self, name: str) -> None:
        if name not in self._writer.done:
            digest = checksum(self._network.read(name).contiguous())
            self._writer.write({name: self.scaled_tensor(name)}, note={"inputs": [[0, name, digest]]})

    def _read_written(self, name: str) -> Tensor:
        return self._writer.read(name) if name in self._dtypes else super()._read_written(name)


def _told(chain: Chain, found: Found) -> Mapping[str, Any]:
    """What the report tells of a scaling."""
    share = found.error / found.before if found.before > 0 else 1.0
    return {"by": chain.source, "exponent": found.exponent, "duo": found.duo, "error_share": round(share, 6)}
