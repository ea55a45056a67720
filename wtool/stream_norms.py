"""What comes after a block sees its output through norms: which these are, and what they multiply its features by.

Found by running, not by name: modules whose parameters are vectors as long as the hidden states, and which are called
with the hidden states as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wtool.block_pass import Forward
from wtool.calibrate import in_place_of_blocks, without_cache
from wtool.network import Network

Met = Callable[[str, nn.Module, Any], None]  # told of a module's name, and of what it is called with


def gains_after(forward: Forward, tokens: Tensor) -> Tensor | None:
    """By how much the norms that read a block's output multiply its features, float32 [features].

    forward: of the block, filled. Norms that it gives its own input to are looked for in the next block by their names
    tokens:  int64 [length], a text to run the model on where its last norm is looked for

    returns: of several norms the root of the mean square; None where no norm reads the output as it is
    """
    network, index = forward.network, forward.block.index
    if index + 1 < len(network.blocks):
        after, features = network.blocks[index + 1], forward.hidden[0].shape[-1:]
        there = {name for name, module in after.module.named_modules() if _is_norm(module, features)}
        names = [f"{after.name}.{name}" for name in _read_in(forward) if name in there]
    else:
        names = _read_at_the_end(network, tokens[:1])
    if not names:
        return None
    with network.filled_modules(names) as norms:
        squares = [gains(norm).square() for norm in norms]
    return torch.stack(squares).mean(0).sqrt()


def gains(norm: nn.Module) -> Tensor:
    """What a norm multiplies each feature by, float32 [features], whether it subtracts a mean, adds 1 or a bias.

    Numbers that are 1 and -1 in turn have the mean square 1 and, if they are even in number, the mean 0.
    """
    weight = next(norm.parameters())
    signs = torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    signs[..., 1::2] = -1
    return ((norm(signs).float() - norm(-signs).float()) / 2 * signs.float()).flatten()


def _read_in(forward: Forward) -> list[str]:
    """Names, within the block, of the norms that it gives its input to."""
    given: list[Tensor] = []
    met: dict[str, None] = {}

    def meet(name: str, module: nn.Module, fed: Any) -> None:
        if _is_norm(module, given[0].shape[-1:]) and _is_fed(fed, given[0]):
            met[name] = None

    block = forward.block.module
    handles = [
        block.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0])),
        *_told_of(dict(block.named_modules()), meet),
    ]
    try:
        forward.run(0)
    finally:
        _remove(handles)
    return list(met)


class _Reached(Exception):
    """Ends a forward at what follows the blocks."""


def _read_at_the_end(network: Network, tokens: Tensor) -> list[str]:
    """The name of the norm that is first of all after the blocks, if it is one."""
    last: list[Tensor] = []
    met: list[str] = []

    def stand_in(number: int, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if number == len(network.blocks) - 1:
            last.append(state)
        return state

    def meet(name: str, module: nn.Module, fed: Any) -> None:
        if last:
            met.extend([name] if _is_norm(module, last[0].shape[-1:]) and _is_fed(fed, last[0]) else [])
            raise _Reached

    blocks = tuple(f"{block.name}." for block in network.blocks)
    outside = {name: module for name, module in network.model.named_modules() if not name.startswith(blocks)}
    handles = _told_of(outside, meet)  # before what fills modules: the head is not to be
    ids = tokens[None].to(network.device)
    try:
        with network.filled_on_demand(), in_place_of_blocks(network, stand_in):
            network.model(input_ids=ids, attention_mask=torch.ones_like(ids), **without_cache(network))
    except _Reached:
        pass
    finally:
        _remove(handles)
    return met


def _told_of(modules: Mapping[str, nn.Module], meet: Met) -> list[RemovableHandle]:
    """Have a function told whenever a module with parameters of its own is called."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: meet(name, module, arguments[0] if arguments else None)

    own = {name: module for name, module in modules.items() if next(module.parameters(recurse=False), None) is not None}
    return [module.register_forward_pre_hook(hook_of(name)) for name, module in own.items()]


def _is_norm(module: nn.Module, shape: torch.Size) -> bool:
    """Whether a module is a norm as far as its parameters tell: vectors, as long as hidden states."""
    shapes = {parameter.shape for parameter in module.parameters()}
    return shapes == {shape}


def _is_fed(fed: Any, states: Tensor) -> bool:
    """Whether what a module is called with are these hidden states, in the same memory."""
    return isinstance(fed, Tensor) and (fed.data_ptr(), fed.shape) == (states.data_ptr(), states.shape)


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
