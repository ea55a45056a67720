"""What the parts of a model do for it, as one run on calibration text tells.

For every linear, what each of its inputs adds to its outputs: the mean of x_j² times |W[:, j]|², which is what the
outputs would lose (squared, summed) if that input were 0 and inputs were not correlated. For every layer how much it
turns the residual stream; for every norm how its input is shared out over channels; for every expert how strongly it
speaks where it is asked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wtool.block_pass import Site, Visitor
from wtool.checkpoint import Checkpoint
from wtool.network import Block, Linear, Network, Read
from wtool.statistics import Gram, Moments

from .experts import Routing
from .families import FAMILIES, Family
from .rotate import unit
from .structure import axes_of, place_of

if TYPE_CHECKING:
    from wtool.calibrate import Where
    from wtool.calibration_data import Windows

Progress = Callable[[int], None]


@dataclass
class Importance:
    """What was gathered. Layers and experts by their numbers, tensors by their names."""

    energies: dict[str, Tensor] = field(default_factory=dict)  # of linears: float32 [in], as above
    influences: dict[int, float] = field(default_factory=dict)  # of layers: 1 - mean cosine of input and output
    ends: list[Tensor] = field(
        default_factory=list
    )  # [windows, hidden], last tokens before layer 0, 1, … and after all
    spread: dict[str, Tensor] = field(default_factory=dict)  # of norms: [hidden], mean of x_i² / mean of x²
    strengths: dict[int, Tensor] = field(default_factory=dict)  # of experts: mean of weight · |output|, [experts]
    visits: dict[int, Tensor] = field(default_factory=dict)  # of experts: tokens routed to each, [experts]
    # where it was asked for: float32 [hidden, hidden], mean of x xᵀ over tokens x between blocks, |x|² = hidden each
    second_moment: Tensor | None = None


def observe(
    source: Checkpoint,
    windows: "Windows",
    where: "Where",
    start: Callable[[int], Progress],
    *,
    second_moment: bool = False,
    directions: Tensor | None = None,
) -> Importance:
    """Run a model on calibration text.

    second_moment: whether to gather that of the residual stream
    directions:    [hidden, hidden], one a column, in the place of channels where norms' inputs are shared out

    raises: InputError
    """
    from wtool import calibrate

    network = calibrate.network(source, where)
    visitor = _Observing(network, FAMILIES.get(str(source.config.get("model_type"))), second_moment, directions)
    calibrate.walk(network, windows.unpadded(), visitor, way="observe", where=where, start=start)
    return visitor.found


class _Spread:
    """How a norm's input is shared out over channels, token by token."""

    def __init__(self, centred: bool, directions: Tensor | None) -> None:
        self._centred, self._directions, self._sum, self._tokens = centred, directions, None, 0

    def add(self, inputs: Tensor, *_: Any, **__: Any) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        rows = rows - rows.mean(1, keepdim=True) if self._centred else rows
        rows = rows if self._directions is None else rows @ self._directions
        squares = rows.square()
        shares = (squares / squares.mean(1, keepdim=True).clamp(min=1e-30)).sum(0, dtype=torch.float64)
        self._sum = shares if self._sum is None else self._sum + shares
        self._tokens += len(rows)

    def mean(self) -> Tensor:
        assert self._sum is not None, "a norm is called in every run"
        return (self._sum / self._tokens).float()


class _Observing(Visitor[Moments]):
    """Looks, and changes nothing."""

    def __init__(self, network: Network, family: Family | None, second_moment: bool, directions: Tensor | None):
        self.found = Importance()
        self._network, self._family = network, family
        self._asked = second_moment
        self._directions = None if directions is None else directions.to(network.device, torch.float32)
        self._stream: Gram | None = None
        self._cosines: list[Tensor] = []
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._spreads: dict[str, _Spread] = {}
        self._routing: Routing | None = None

    def written(self, block: Block) -> Read | None:
        return None

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> Moments:
        expert = linears[0].slot.expert
        if self._routing is None or expert is None or self._axis(linears[0].name) != "expert_ffn":
            return Moments(features, device)
        return self._routing.moments(expert, self._network.view(linears[0]), features, device)

    def site(self, site: Site[Moments]) -> Mapping[Linear, Tensor]:
        squares = site.gathered.mean_square
        for linear in site.linears:
            columns = self._network.view(linear).float().square().sum(0)
            self.found.energies[linear.name] = (squares * columns).cpu()
        return {}

    def watched(self, block: Block) -> Mapping[str, Callable[..., None]]:
        self._routing = None
        experts = {
            linear.slot.parameter.rpartition(".")[0] for linear in block.linears if linear.slot.expert is not None
        }
        watched: dict[str, Callable[..., None]] = {}
        if len(experts) == 1:
            (name,) = experts
            self._routing = Routing()
            watched[name] = self._routing.met
        for name, module in block.module.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor) and "norm" in type(module).__name__.lower():
                spread = self._spread_of(module)
                path = f"{block.name}.{name}"
                self._spreads[self._stored(block, f"{path}.weight")] = spread
                watched[path] = spread.add
        return watched

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        number = block.index
        for linear in unseen:
            self.found.energies[linear.name] = torch.zeros(linear.shape[1])
        self.found.influences[number] = 1 - float(torch.cat(self._cosines).mean())
        if not self.found.ends:
            self.found.ends.append(torch.cat(self._before))
        self.found.ends.append(torch.cat(self._after))
        self.found.spread |= {name: spread.mean().cpu() for name, spread in self._spreads.items()}
        if self._routing is not None:
            count = max(linear.slot.expert or 0 for linear in block.linears) + 1
            self.found.strengths[number], self.found.visits[number] = self._routing.told(count)
        if self._stream is not None and number == len(self._network.blocks) - 1:
            self.found.second_moment = self._stream.finish().cpu()
        self._cosines, self._before, self._after, self._spreads = [], [], [], {}
        return {}

    def passed(self, block: Block, batch: int, before: Tensor, after: Tensor) -> None:
        before, after = before.float(), after.float()
        self._cosines.append(torch.nn.functional.cosine_similarity(before, after, dim=-1).flatten().cpu())
        self._before.append(before[:, -1].cpu())
        self._after.append(after[:, -1].cpu())
        self._add_to_stream(before)
        if block.index == len(self._network.blocks) - 1:
            self._last(after)
            self._add_to_stream(after)

    def _last(self, hidden: Tensor) -> None:
        """The norm after the last block."""
        for group in self._network.rest:
            if place_of(group.target)[0] < 0 and group.target.endswith(("norm.weight", "ln_f.weight")):
                norm = self._network.model.get_submodule(group.target.rpartition(".")[0])
                self._spreads.setdefault(group.sources[0], self._spread_of(norm)).add(hidden)

    def _spread_of(self, norm: Any) -> _Spread:
        over_stream = self._directions is not None and len(self._directions) == norm.weight.numel()
        return _Spread(isinstance(norm, torch.nn.LayerNorm), self._directions if over_stream else None)

    def _add_to_stream(self, hidden: Tensor) -> None:
        if self._asked:
            self._stream = self._stream or Gram(hidden.shape[-1], hidden.device)
            self._stream.add(unit(hidden))

    def _axis(self, tensor: str) -> str | None:
        """What a linear's inputs are."""
        if self._family is None:
            return None
        axes = axes_of(self._family, tensor)
        return axes[0 if self._family.transposed else -1]

    def _stored(self, block: Block, parameter: str) -> str:
        """The tensor that a parameter comes from."""
        return next((group.sources[0] for group in block.groups if group.target == parameter), parameter)
