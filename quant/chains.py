"""Where a scale is folded, by the names of tensors: what the experiment in `feeds` found, in the checkpoint's terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from wtool.network import Block, Group, Linear

from .feeds import Feed


@dataclass(frozen=True)
class Rows:
    """Rows of a stored matrix that are divided."""

    linear: Linear
    begin: int  # the first of the matrix's rows
    first: int  # the scale it is divided by; the rows after it, by those after it
    count: int


@dataclass(frozen=True)
class Taker:
    """A stored matrix whose columns are multiplied."""

    tensor: str
    channel: Tensor | None  # the scale of every column; None where they are the same
    linear: Linear | None  # None for what is not a linear layer, as a router


@dataclass(frozen=True)
class Chain:
    """A scaled output and all that it goes into."""

    channels: int
    takers: tuple[Taker, ...]
    norm: str | None = None  # the tensor of a norm's weight
    offset: int = 0  # what the norm adds to its weight
    rows: tuple[Rows, ...] = ()  # where there is no norm
    bias: str | None = None  # of the norm, or of the matrix that the rows are of

    @property
    def source(self) -> str:
        """What takes the scale, for people."""
        return self.norm or self.rows[0].linear.name


def chains(block: Block, feed: Feed) -> list[Chain]:
    """The chains of a feed, one for every expert where an expert's matrix feeds its own; none where a tensor's place
    in the checkpoint is not known."""
    stored = _Stored(block)
    takers = [(parameter, channel, stored.linears(parameter)) for parameter, channel in feed.takers.items()]
    if any(stored.group(parameter) is None for parameter in [feed.parameter, *feed.takers]):
        return []
    bias_parameter = f"{feed.parameter.removesuffix('weight')}bias"
    bias = stored.group(bias_parameter) if feed.parameter.endswith("weight") else None
    if bias is not None and bias.converter is not None:
        return []
    bias_name = None if bias is None else bias.sources[0]
    if feed.kind != "rows":
        offset = 1 if feed.kind == "norm of 1 + weight" else 0
        norm = stored.single(feed.parameter)
        found = _all_takers(stored, takers)
        return [Chain(feed.channels, found, norm, offset, bias=bias_name)] if norm and found else []
    return _from_rows(stored, feed, takers, bias_name)


def _from_rows(
    stored: "_Stored", feed: Feed, takers: Sequence[tuple[str, Tensor | None, list[Linear]]], bias: str | None
) -> list[Chain]:
    origins = stored.linears(feed.parameter)
    experts = {linear.slot.expert for linear in origins}
    found: list[Chain] = []
    for expert in sorted(experts, key=lambda number: -1 if number is None else number):
        rows = tuple(part for linear in origins if linear.slot.expert == expert for part in _part(linear, feed))
        own = [
            (parameter, channel, [linear for linear in linears if linear.slot.expert == expert])
            for parameter, channel, linears in takers
        ]
        fed = _all_takers(stored, own)
        if not rows or not fed or (bias and len(rows) > 1) or (expert is not None and _has_plain(fed)):
            return []
        found.append(Chain(feed.channels, fed, rows=rows, bias=bias))
    return found


def _has_plain(takers: Sequence[Taker]) -> bool:
    return any(taker.linear is None for taker in takers)


def _all_takers(stored: "_Stored", takers: Sequence[tuple[str, Tensor | None, list[Linear]]]) -> tuple[Taker, ...]:
    """Every matrix that takes the scale; none where one of them is not known by a name of its own."""
    found: list[Taker] = []
    for parameter, channel, linears in takers:
        if linears:
            found += [Taker(linear.name, channel, linear) for linear in linears]
        elif (name := stored.single(parameter)) is not None and not stored.linears(parameter):
            found.append(Taker(name, channel, None))
        else:
            return ()
    return tuple(found)


def _part(linear: Linear, feed: Feed) -> list[Rows]:
    """The rows of a stored matrix that are among the feed's outputs."""
    first, last = linear.slot.rows or (0, linear.shape[0])
    begin, end = max(first, feed.begin), min(last, feed.begin + feed.channels)
    return [Rows(linear, begin - first, begin - feed.begin, end - begin)] if begin < end else []


class _Stored:
    """A block's tensors by parameters, whose names are those in the block."""

    def __init__(self, block: Block):
        prefix = f"{block.name}."
        self._groups: Mapping[str, Group] = {group.target.removeprefix(prefix): group for group in block.groups}
        self._linears: dict[str, list[Linear]] = {}
        for linear in block.linears:
            self._linears.setdefault(linear.slot.parameter.removeprefix(prefix), []).append(linear)

    def group(self, parameter: str) -> Group | None:
        return self._groups.get(parameter)

    def linears(self, parameter: str) -> list[Linear]:
        """The stored matrices that a parameter is made of; none where one of its tensors is no such matrix."""
        group, found = self._groups.get(parameter), self._linears.get(parameter, [])
        return found if group is not None and len(found) == len(group.sources) else []

    def single(self, parameter: str) -> str | None:
        """The stored tensor that a parameter is, as it lies."""
        group = self._groups.get(parameter)
        return group.sources[0] if group is not None and group.converter is None else None
