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

The sequential way can be asymmetric: beside the batches, what they are in the model as it was goes through the blocks
as they were, and what is gathered are pairs of inputs, now and before anything was changed. In memory is twice as much.
(Of a block with experts only what they are now is gathered.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from wtool.block_pass import Call, Forward, HiddenStates, Sites, observe, one_pass
from wtool.block_pass import Site as Site
from wtool.block_pass import Visitor as Visitor
from wtool.checkpoint.base import Checkpoint
from wtool.console import working_on
from wtool.errors import InputError, UsageError
from wtool.flows import sequential
from wtool.memory import give_back_freed_memory, give_back_large_blocks
from wtool.network import Network
from wtool.ranks import ALONE, Ranks
from wtool.writer import checksum

Way = Literal["observe", "one-pass", "sequential", "asymmetric"]
Place = Literal["device", "cpu", "disk"]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Where:
    """What changes where and how fast a walk goes, and not what it is to find."""

    device: str = "cpu"
    dtype: str | None = None  # safetensors name of the type to compute in; None picks one
    activations: Place = "device"  # where they wait between two blocks
    batch_tokens: int = 2048  # run at a time, one window at least
    trust_remote_code: bool = False


HERE = Where()


class _Recorded(Exception):
    """Ends a forward when the last block was reached."""


def network(checkpoint: Checkpoint, where: Where) -> Network:
    """The model to walk through.

    raises: InputError, UsageError
    """
    dtype = where.dtype or working_dtype(checkpoint, where.device)
    return Network(checkpoint, dtype=dtype, device=where.device, trust_remote_code=where.trust_remote_code)


def walk(
    network: Network,
    windows: Sequence[Tensor],
    visitor: Visitor[Any],
    *,
    way: Way = "sequential",
    where: Where = HERE,
    ranks: Ranks = ALONE,
    start: Callable[[int], Progress] = lambda steps: lambda done: None,
) -> None:
    """Send windows of tokens through a network, block by block.

    windows: int64 [length] each, without padding; windows of one length are run together
    ranks: the processes that call this with the same windows; each runs some of the batches
    start: is told how many steps there are and gives the function that is told of each

    raises: InputError, UsageError where there are fewer batches than processes
    """
    batches = _share(batches_of(windows, where.batch_tokens), ranks)
    progress = start(len(batches) * len(network.blocks))
    give_back_large_blocks()
    give_back_freed_memory()  # what tokenizing left
    places = (where.activations, network.device)
    with torch.inference_mode(), hidden_states(*places) as hidden, hidden_states(*places) as old:
        calls = first_inputs(network, batches, hidden)
        for number in range(len(batches) if way == "asymmetric" else 0):
            old[number] = hidden[number]
        sites = Sites()
        for block in network.blocks:
            own = [call[block.index] for call in calls]
            forward = Forward(network, block, own, hidden, visitor, progress, ranks)
            before = replace(forward, hidden=old, progress=lambda done: None) if way == "asymmetric" else None
            read = visitor.written(block)
            working_on(block.name)
            if before and (read is not None or block.fused):
                with network.filled(block):
                    before.plain()
            with network.filled(block, read):
                if read is None and (another := visitor.prepare(forward, sites)):
                    network.fill(block, another)
                if read is not None:
                    forward.plain()
                elif way == "observe":
                    observe(forward, sites)
                elif way == "one-pass" or block.fused:
                    one_pass(forward, sites)
                else:
                    sequential(forward, sites, before)
            give_back_freed_memory()


def _share(batches: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """Whole batches, so that each is computed as in one process."""
    if len(batches) < ranks.size:
        raise UsageError(
            f"{ranks.size} processes for {len(batches)} batches of calibration text: take fewer processes, more "
            "--samples, or fewer --batch-tokens"
        )
    return ranks.own(batches)


def batches_of(windows: Sequence[Tensor], batch_tokens: int, most: int | None = None) -> list[Tensor]:
    """Windows of one length together, in their order, at most `batch_tokens` tokens and `most` windows at a time."""
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    batches: list[Tensor] = []
    for length, alike in by_length.items():
        count = max(1, min(batch_tokens // length, most or len(alike)))
        batches += [torch.stack(alike[begin : begin + count]) for begin in range(0, len(alike), count)]
    return batches


@contextmanager
def hidden_states(place: Place, device: torch.device) -> Iterator[HiddenStates]:
    if place != "disk":
        yield HiddenStates(device if place == "device" else torch.device("cpu"), None)
        return
    with tempfile.TemporaryDirectory(prefix="wtool-activations-") as folder:
        yield HiddenStates(device, Path(folder))


def first_inputs(network: Network, batches: Sequence[Tensor], hidden: HiddenStates) -> list[list[Call]]:
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

    def record(number: int, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first.append(state)
        calls.append(Call(args, kwargs))
        if len(calls) == len(network.blocks):
            raise _Recorded
        return state

    with in_place_of_blocks(network, record):
        try:
            network.model(input_ids=ids, attention_mask=torch.ones_like(ids), **without_cache(network))
        except _Recorded:
            pass
    if len(calls) < len(network.blocks) or any(state is not first[0] for state in first):
        raise InputError(
            f"{network.checkpoint.label}: a {type(network.model).__name__} does not hand the output of a layer to the "
            "next one alone, so it cannot be walked block by block"
        )
    return first[0], calls


@contextmanager
def in_place_of_blocks(
    network: Network, function: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
) -> Iterator[None]:
    """Have a function called in the place of every block, for a while.

    function: of the block's number, its hidden states, and its other arguments; gives hidden states
    """

    def stand_in(number: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            state, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            return function(number, state, args, kwargs)

        return forward

    for number, block in enumerate(network.blocks):
        block.module.forward = stand_in(number)
    try:
        yield
    finally:
        for block in network.blocks:
            del block.module.forward


def without_cache(network: Network) -> dict[str, bool]:
    """Arguments of the model by which it keeps no keys and values."""
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


def working_dtype(checkpoint: Checkpoint, device: str) -> str:
    """The type that blocks are run in unless told otherwise.

    That of `wtool.loading`, and bfloat16 for a bfloat16 model where the processor has tiles for it: it multiplies
    that faster than float32, with float32 sums.
    """
    from wtool.loading import own_dtype
    from wtool.loading import working_dtype as usual

    tiles = device.startswith("cpu") and torch.cpu._is_amx_tile_supported()
    return "BF16" if tiles and own_dtype(checkpoint) == "BF16" else usual(checkpoint, device)
