"""Taking all batches through one block of a model that is filled; `wtool.calibrate` tells the ways to do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from wtool.console import working_on
from wtool.memory import give_back_freed_memory
from wtool.network import Block, Linear, Network, Read, Regions
from wtool.ranks import ALONE, Ranks

# function -> where its input and its matrix stand among the arguments, and their names
WATCHED: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
}


class Statistic(Protocol):
    """What is gathered of an input while batches go by."""

    def add(self, inputs: Tensor) -> None:
        """Take in tokens, [..., features]."""
        ...


S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Site(Generic[S]):
    """An input that some linears share, and what was gathered of it."""

    block: Block
    linears: tuple[Linear, ...]
    gathered: S


class Visitor(Protocol[S]):
    """What is done on the way."""

    def written(self, block: Block) -> Read | None:
        """Where to read a block that was finished by an earlier run; None if it is still to be done."""
        ...

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> S | None:
        """Begin to gather of an input that some linears share; None where nothing is to be known of it."""
        ...

    def site(self, site: Site[S]) -> Mapping[Linear, Tensor]:
        """The matrices [out, in] that take the place of the site's; none where nothing changes."""
        ...

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        """Called when all sites of a block were visited, before the next block is run.

        unseen: linears that no token came to
        returns: matrices for them
        """
        ...

    def prepare(self, forward: Forward, sites: Sites) -> Read | None:
        """Look at a filled block before anything of it is changed.

        returns: where to read the block again, if it is to be another one from here on
        """
        return None

    def watched(self, block: Block) -> Mapping[str, Callable[..., None]]:
        """Functions to be called with what modules are called with, by the modules' names.

        In a run of the block that nothing stops: when it is observed, and after one pass.
        """
        return {}

    def passed(self, block: Block, batch: int, before: Tensor, after: Tensor) -> None:
        """Shown the hidden states [windows, tokens, features] that went into a block for good, and what came out."""
        return


@dataclass(frozen=True)
class Call:
    """How a block is called, its hidden states left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class HiddenStates:
    """Hidden states of every batch, where they do not stand in the way."""

    def __init__(self, device: torch.device, folder: Path | None):
        self._device, self._folder = device, folder
        self._kept: dict[int, Tensor] = {}

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        if self._folder is None:
            self._kept[number] = hidden.to(self._device)
            return
        kept = self._kept.get(number)
        if kept is None or kept.shape != hidden.shape:
            path = str(self._folder / f"{number}.bin")
            flat = torch.from_file(path, shared=True, size=hidden.numel(), dtype=hidden.dtype)
            kept = self._kept[number] = flat.view(hidden.shape)
        kept.copy_(hidden)

    def __getitem__(self, number: int) -> Tensor:
        return self._kept[number]

    def take(self, number: int) -> Tensor:
        """A batch's states, which need not be kept any longer."""
        return self._kept[number] if self._folder else self._kept.pop(number)


@dataclass
class Forward:
    """One block on all batches."""

    network: Network
    block: Block
    calls: Sequence[Call]
    hidden: HiddenStates
    visitor: Visitor[Any]
    progress: Callable[[int], None]
    ranks: Ranks = ALONE  # who run the other batches

    def run(self, number: int, *, last: bool = False) -> Tensor:
        """The block's output for a batch.

        last: its input is not needed again
        """
        call = self.calls[number]
        states = (self.hidden.take(number) if last else self.hidden[number]).to(self.network.device)
        output = self.block.module(states, *call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if last:
            self.visitor.passed(self.block, number, states, output)
        return output

    def visit(self, site: Site[Any]) -> None:
        """Let the visitor change the linears of a site."""
        working_on(site.linears[0].name)
        give_back_freed_memory()  # what the forward left
        self.change(self.visitor.site(site))

    def plain(self) -> None:
        """Run all batches and keep the outputs."""
        with self._watching():
            for number in range(len(self.calls)):
                self.hidden[number] = self.run(number, last=True)
                self.progress(1)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        model, handles = self.network.model, list[RemovableHandle]()
        for name, show in self.visitor.watched(self.block).items():

            def hook(module: Module, arguments: Any, named: Any, show: Callable[..., None] = show) -> None:
                show(*arguments, **named)

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def regions(self) -> Regions:
        return Regions(self.network, self.block.linears)

    def change(self, values: Mapping[Linear, Tensor]) -> None:
        for linear, value in values.items():
            self.network.view(linear).copy_(value)


class _Watch(TorchFunctionMode):
    """Tells of every product with a block's linears before it is computed."""

    def __init__(self, regions: Regions, meet: Callable[[tuple[Linear, ...], Tensor], None]):
        super().__init__()
        self._regions, self._meet = regions, meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if places := WATCHED.get(func):
            fed, weight = (args[i] if i < len(args) else kwargs.get(name) for i, name in places)
            if isinstance(weight, Tensor) and (linears := self._regions.of(weight)):
                self._meet(linears, fed)
        return func(*args, **kwargs)


class Sites:
    """Which linears share an input, found by that input's identity in a run of one batch.

    Blocks of one kind are alike, so one of each kind is looked at.
    """

    def __init__(self) -> None:
        self._known: dict[Any, list[tuple[int, ...]]] = {}

    def of(self, forward: Forward, regions: Regions) -> dict[str, tuple[Linear, ...]]:
        """Name of a linear -> those that share its input, in the order they are met."""
        block = forward.block
        kind = tuple(
            replace(linear.slot, parameter=linear.slot.parameter.removeprefix(block.name)) for linear in block.linears
        )
        if kind not in self._known:
            number_of = {linear: number for number, linear in enumerate(block.linears)}
            met: dict[Any, tuple[list[int], Tensor]] = {}

            def meet(linears: tuple[Linear, ...], fed: Tensor) -> None:
                # the input is held, so that no other one can be at its address
                numbers, _ = met.setdefault((fed.data_ptr(), fed.numel(), fed.dtype), ([], fed))
                numbers += [number_of[linear] for linear in linears]

            with _Watch(regions, meet):
                forward.run(0)
            self._known[kind] = [tuple(numbers) for numbers, _ in met.values()]
        sites = [tuple(block.linears[number] for number in site) for site in self._known[kind]]
        return {linear.name: site for site in sites for linear in site}


@dataclass
class Gathered:
    """The statistics of a block's inputs while they come in."""

    forward: Forward
    shared: Mapping[str, tuple[Linear, ...]]
    found: dict[tuple[Linear, ...], Any] = field(default_factory=dict)

    def add(self, linears: tuple[Linear, ...], fed: Tensor) -> None:
        """Take in what linears are fed; of linears that share an input, the first counts."""
        if (found := self._of(linears, fed)) is not None:
            found.add(fed)

    def add_pair(self, linears: tuple[Linear, ...], fed: Tensor, before: Tensor) -> None:
        """The same, with what they were fed before anything was changed."""
        if (found := self._of(linears, fed)) is not None:
            found.add_pair(fed, before)

    def _of(self, linears: tuple[Linear, ...], fed: Tensor) -> Any:
        """What to add it to, if to anything."""
        site = self.shared.get(linears[0].name, linears)
        if linears[0] != site[0]:
            return None
        if site not in self.found:
            self.found[site] = self.forward.visitor.gather(site, fed.shape[-1], self.forward.network.device)
        return self.found[site]

    def agree(self) -> None:
        """Know of what any process met: an expert may have seen tokens in another one only."""
        if self.forward.ranks.size == 1:
            return
        visitor, device = self.forward.visitor, self.forward.network.device
        met = dict.fromkeys(site for found in self.forward.ranks.of_all(list(self.found)) for site in found)
        for site in met:
            if site not in self.found:
                self.found[site] = visitor.gather(site, site[0].shape[1], device)
        self.found = {site: self.found[site] for site in met}

    def unseen(self) -> list[Linear]:
        """Linears that no token came to."""
        seen = {linear for site in self.found for linear in site}
        return [linear for linear in self.forward.block.linears if linear not in seen]

    def sites(self) -> Iterator[Site[Any]]:
        """What was gathered in all processes, each forgotten when the next is asked for."""
        for linears in list(self.found):
            if (gathered := self.found.pop(linears)) is not None:
                if self.forward.ranks.size > 1:
                    self.forward.ranks.add_up(gathered.sums())
                yield Site(self.forward.block, linears, gathered)


def observe(forward: Forward, sites: Sites) -> None:
    gathered = gathered_passing(forward, sites)
    unseen = gathered.unseen()
    for site in gathered.sites():
        forward.visitor.site(site)
    forward.visitor.block(forward.block, unseen)


def gathered_passing(forward: Forward, sites: Sites) -> Gathered:
    """Run all batches for what goes into the linears, and keep the outputs."""
    gathered = Gathered(forward, sites.of(forward, forward.regions()))
    with _Watch(forward.regions(), gathered.add):
        forward.plain()
    gathered.agree()
    return gathered


def gathered_inputs(forward: Forward, sites: Sites) -> Gathered:
    """Run all batches for what goes into the linears; the block's input stays."""
    regions = forward.regions()
    gathered = Gathered(forward, sites.of(forward, regions))
    with _Watch(regions, gathered.add):
        for number in range(len(forward.calls)):
            forward.run(number)
    gathered.agree()
    return gathered


def one_pass(forward: Forward, sites: Sites) -> None:
    gathered = gathered_inputs(forward, sites)
    seen = {linear for site in gathered.found for linear in site}
    for site in gathered.sites():
        forward.visit(site)
    finish(forward, seen)
    forward.plain()


def finish(forward: Forward, seen: set[Linear]) -> None:
    forward.change(
        forward.visitor.block(forward.block, [linear for linear in forward.block.linears if linear not in seen])
    )
