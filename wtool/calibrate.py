"""The walk: calibration tokens go through the model block by block, and what each linear is fed is gathered.

What the first block is fed, and the keyword arguments of every block (masks, rotary embeddings, windows), come from
the model's own forward with its blocks replaced by recorders. Then a block at a time is filled, run, changed and
forgotten. In memory are one block, its statistics and the activations between two blocks.

Three ways to go through a block:

    observe     run it once, gather all inputs; nothing changes
    one pass    run it to gather all inputs, change the linears, run it again changed
    sequential  run it once, all batches side by side: each stops at the next linears, which are changed when all
                inputs have come, and goes on through the changed ones. So every linear is fitted to what the changed
                ones before it feed it, and the block is run once instead of twice; in memory are the inputs of one
                linear for all tokens.

A block with experts goes in one pass, as experts are not run side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wtool.checkpoint.base import Checkpoint
from wtool.errors import InputError
from wtool.memory import give_back_freed_memory, give_back_large_blocks
from wtool.network import Block, Linear, Network, Read, Regions
from wtool.statistics import Gram
from wtool.writer import checksum

Way = Literal["observe", "one-pass", "sequential"]
Place = Literal["device", "cpu", "disk"]
# function -> where its input and its matrix stand among the arguments, and their names
WATCHED: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
}


@dataclass(frozen=True)
class Site:
    """An input that some linears share, and what was gathered of it."""

    block: Block
    linears: tuple[Linear, ...]
    gram: Gram


class Visitor(Protocol):
    """What is done on the way."""

    def written(self, block: Block) -> Read | None:
        """Where to read a block that was finished by an earlier run; None if it is still to be done."""
        ...

    def site(self, site: Site) -> Mapping[Linear, Tensor]:
        """The matrices [out, in] that take the place of the site's; none where nothing changes."""
        ...

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        """Called when all sites of a block were visited, before the next block is run.

        unseen: linears that no token came to
        returns: matrices for them
        """
        ...


@dataclass(frozen=True)
class Call:
    """How a block is called, its hidden states left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Recorded(Exception):
    """Ends a forward when the last block was reached."""


def walk(
    network: Network,
    windows: Sequence[Tensor],
    visitor: Visitor,
    *,
    way: Way = "sequential",
    batch_tokens: int = 2048,
    activations: Place = "device",
    progress: Callable[[int], None] = lambda steps: None,
) -> None:
    """Send windows of tokens through a network, block by block.

    windows: int64 [length] each, without padding; windows of one length are run together
    batch_tokens: tokens run at a time, one window at least
    activations: where they wait between two blocks
    progress: is told 1 for each batch that has gone through a block (`steps` tells the total)

    raises: InputError
    """
    batches = _batches(windows, batch_tokens)
    give_back_large_blocks()
    with torch.inference_mode(), _store(activations, network.device) as hidden:
        calls = _first_inputs(network, batches, hidden)
        sites = _Sites()
        for block in network.blocks:
            forward = _Forward(network, block, [call[block.index] for call in calls], hidden, progress)
            read = visitor.written(block)
            with network.filled(block, read):
                if read is not None:
                    forward.plain()
                elif way == "observe":
                    _observe(forward, sites, visitor)
                elif way == "one-pass" or block.fused:
                    _one_pass(forward, sites, visitor)
                else:
                    _sequential(forward, sites, visitor)
            give_back_freed_memory()


def steps(network: Network, windows: Sequence[Tensor], batch_tokens: int = 2048) -> int:
    """How many steps `progress` will be told of."""
    return len(_batches(windows, batch_tokens)) * len(network.blocks)


def _batches(windows: Sequence[Tensor], batch_tokens: int) -> list[Tensor]:
    """Windows of one length together, in their order, at most `batch_tokens` tokens at a time."""
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    batches: list[Tensor] = []
    for length, alike in by_length.items():
        count = max(1, batch_tokens // length)
        batches += [torch.stack(alike[begin : begin + count]) for begin in range(0, len(alike), count)]
    return batches


class _Store:
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


@contextmanager
def _store(place: Place, device: torch.device) -> Iterator[_Store]:
    if place != "disk":
        yield _Store(device if place == "device" else torch.device("cpu"), None)
        return
    with tempfile.TemporaryDirectory(prefix="wtool-activations-") as folder:
        yield _Store(device, Path(folder))


def _first_inputs(network: Network, batches: Sequence[Tensor], hidden: _Store) -> list[list[Call]]:
    """Run the model up to its first block: keep what that is fed in `hidden`, return the calls [batch][block]."""
    interned: dict[Any, Tensor] = {}
    calls: list[list[Call]] = []
    with network.filled_on_demand():
        for number, ids in enumerate(batches):
            hidden[number], recorded = _record(network, ids.to(network.device))
            calls.append([_interned(call, interned) for call in recorded])
    return calls


def _record(network: Network, ids: Tensor) -> tuple[Tensor, list[Call]]:
    """Run the model with recorders in the place of its blocks."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def recorder(*args: Any, **kwargs: Any) -> Tensor:
        state, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        first.append(state)
        calls.append(Call(args, kwargs))
        if len(calls) == len(network.blocks):
            raise _Recorded
        return state

    for block in network.blocks:
        block.module.forward = recorder
    try:
        network.model(input_ids=ids, attention_mask=torch.ones_like(ids), **_without_cache(network))
    except _Recorded:
        pass
    finally:
        for block in network.blocks:
            del block.module.forward
    if len(calls) < len(network.blocks) or any(state is not first[0] for state in first):
        raise InputError(
            f"{network.checkpoint.label}: a {type(network.model).__name__} does not hand the output of a layer to the "
            "next one alone, so it cannot be walked block by block"
        )
    return first[0], calls


def _without_cache(network: Network) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(network.model.config, "use_cache") else {}


def _interned(value: Any, known: dict[Any, Tensor]) -> Any:
    """The same value, with equal tensors made one: masks and rotary embeddings are those of the batch before."""
    if isinstance(value, Tensor):
        return known.setdefault((value.dtype, value.shape, checksum(value.cpu().contiguous())), value)
    if isinstance(value, Call):
        return Call(_interned(value.args, known), _interned(value.kwargs, known))
    if isinstance(value, (tuple, list)):
        return type(value)(_interned(entry, known) for entry in value)
    if isinstance(value, dict):
        return {key: _interned(entry, known) for key, entry in value.items()}
    return value


@dataclass
class _Forward:
    """One block on all batches."""

    network: Network
    block: Block
    calls: Sequence[Call]
    hidden: _Store
    progress: Callable[[int], None]

    def run(self, number: int, *, last: bool = False) -> Tensor:
        """The block's output for a batch.

        last: its input is not needed again
        """
        call = self.calls[number]
        states = self.hidden.take(number) if last else self.hidden[number]
        output = self.block.module(states.to(self.network.device), *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def plain(self) -> None:
        """Run all batches and keep the outputs."""
        for number in range(len(self.calls)):
            self.hidden[number] = self.run(number, last=True)
            self.progress(1)

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


class _Sites:
    """Which linears share an input, found by that input's identity in a run of one batch.

    Blocks of one kind are alike, so one of each kind is looked at.
    """

    def __init__(self) -> None:
        self._known: dict[Any, list[tuple[int, ...]]] = {}

    def of(self, forward: _Forward, regions: Regions) -> dict[str, tuple[Linear, ...]]:
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
class _Gathered:
    """The statistics of a block's inputs while they come in."""

    block: Block
    shared: Mapping[str, tuple[Linear, ...]]
    device: torch.device
    grams: dict[tuple[Linear, ...], Gram] = field(default_factory=dict)

    def add(self, linears: tuple[Linear, ...], fed: Tensor) -> None:
        """Take in what linears are fed; of linears that share an input, the first counts."""
        site = self.shared.get(linears[0].name, linears)
        if linears[0] != site[0]:
            return
        if site not in self.grams:
            self.grams[site] = Gram(fed.shape[-1], device=self.device)
        self.grams[site].add(fed)

    def sites(self) -> Iterable[Site]:
        """What was gathered, each forgotten when the next is asked for."""
        for linears in list(self.grams):
            yield Site(self.block, linears, self.grams.pop(linears))


def _observe(forward: _Forward, sites: _Sites, visitor: Visitor) -> None:
    regions = forward.regions()
    gathered = _Gathered(forward.block, sites.of(forward, regions), forward.network.device)
    with _Watch(regions, gathered.add):
        forward.plain()
    seen = {linear for site in gathered.grams for linear in site}
    for site in gathered.sites():
        visitor.site(site)
    visitor.block(forward.block, [linear for linear in forward.block.linears if linear not in seen])


def _one_pass(forward: _Forward, sites: _Sites, visitor: Visitor) -> None:
    regions = forward.regions()
    gathered = _Gathered(forward.block, sites.of(forward, regions), forward.network.device)
    with _Watch(regions, gathered.add):
        for number in range(len(forward.calls)):
            forward.run(number)
    seen = {linear for site in gathered.grams for linear in site}
    for site in gathered.sites():
        forward.change(visitor.site(site))
    _finish(forward, visitor, seen)
    forward.plain()


def _finish(forward: _Forward, visitor: Visitor, seen: set[Linear]) -> None:
    forward.change(visitor.block(forward.block, [linear for linear in forward.block.linears if linear not in seen]))


def _sequential(forward: _Forward, sites: _Sites, visitor: Visitor) -> None:
    shared = sites.of(forward, forward.regions())
    released: set[Linear] = set()
    flows = [_Flow(forward, number) for number in range(len(forward.calls))]
    with _stops(forward, released):
        try:
            while flows[0].advance():
                gathered = _Gathered(forward.block, shared, forward.network.device)
                gathered.add(*flows[0].met())
                for flow in flows[1:]:
                    more = flow.advance()
                    assert more, "batches of one block go through the same linears"
                    gathered.add(*flow.met())
                (site,) = gathered.sites()
                forward.change(visitor.site(site))
                released.update(site.linears)
            for flow in flows[1:]:
                more = flow.advance()
                assert not more, "batches of one block go through the same linears"
        finally:
            for flow in flows:
                flow.abandon()
    for number, flow in enumerate(flows):
        forward.hidden[number] = flow.output()
        forward.progress(1)
    _finish(forward, visitor, released)


class _Flow:
    """A batch on its way through a block, stopped before every linear that is not released yet.

    A greenlet is what can be stopped in the middle of a forward. All are of one thread, which runs one at a time.
    """

    def __init__(self, forward: _Forward, number: int):
        self._greenlet = greenlet(lambda: forward.run(number, last=True))
        self._got: Any = None

    def advance(self) -> bool:
        """Go on to the next linears; whether there are any before the block's end."""
        self._got = None
        self._got = self._greenlet.switch()
        return not self._greenlet.dead

    def met(self) -> tuple[tuple[Linear, ...], Tensor]:
        """The linears it stands before, and what they are fed."""
        return self._got

    def output(self) -> Tensor:
        """The block's output, handed out once."""
        output, self._got = self._got, None
        return output

    def abandon(self) -> None:
        """End it where it stands, if it has not come to its end."""
        self._greenlet.throw()


@contextmanager
def _stops(forward: _Forward, released: set[Linear]) -> Iterator[None]:
    """Have the flows stop before linears that are not released, for a while."""
    network = forward.network
    modules: dict[str, tuple[Linear, ...]] = {}
    for linear in forward.block.linears:
        path = linear.slot.parameter.rpartition(".")[0]
        modules[path] = (*modules.get(path, ()), linear)

    def stop(linears: tuple[Linear, ...], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if linears[0] not in released:
            walk = getcurrent().parent
            assert walk is not None, "a flow is started by the walk"
            walk.switch((linears, arguments[0] if arguments else named["input"]))

    hooks = [
        network.model.get_submodule(path).register_forward_pre_hook(
            lambda module, arguments, named, linears=linears: stop(linears, arguments, named), with_kwargs=True
        )
        for path, linears in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def working_dtype(checkpoint: Checkpoint, device: str) -> str:
    """The type that blocks are run in unless told otherwise."""
    from wtool.loading import working_dtype as usual

    if device.startswith("cpu") and torch.cpu._is_amx_tile_supported():
        return "BF16"  # the processor multiplies it faster than float32, with float32 sums
    return usual(checkpoint, device)
