"""The walk that learns: what a block should give is known, and its linears are fitted to that together.

Two streams of activations go through the model side by side: one through the blocks as they were, one through the
blocks as they have been changed. A block is to make of the second what it made of the first, so that it makes up for
the errors of the blocks before it as far as it can.

    1. the block as it was takes the first stream on; its outputs are the targets
    2. it takes the second stream for what goes into its linears; nothing is kept of the outputs
    3. its linears are learned, by gradients through this one block (a `Lesson`)
    4. changed for good, it takes the second stream on

In memory are one block, its gradients, its statistics, both streams, and what one batch needs for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wtool.block_pass import Forward, HiddenStates, S, Sites, Visitor, gathered_inputs
from wtool.calibrate import HERE, Progress, Where, batches_of, first_inputs, hidden_states
from wtool.console import working_on
from wtool.memory import give_back_freed_memory, keep_freed_memory
from wtool.network import Block, Linear, Network, Read


class Fitter(Visitor[S], Protocol):
    """A visitor that fits a block's linears together."""

    def fit(self, lesson: Lesson, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        """Called when all sites of a block were visited, which change nothing.

        unseen: linears that no token came to
        returns: the matrices [out, in] that take the place of the block's
        """
        ...


@dataclass(frozen=True)
class Lesson:
    """A filled block, what it is fed, and what it should give for that."""

    forward: Forward
    targets: HiddenStates

    @property
    def batches(self) -> int:
        return len(self.forward.calls)

    def view(self, linear: Linear) -> Tensor:
        """A matrix where the block has it, [out, in]; writing to it changes the block."""
        return self.forward.network.view(linear)

    def gradients(self, linears: Sequence[Linear], batches: Sequence[int]) -> list[Tensor | None]:
        """Of the loss over some batches, by matrices [out, in]; None for those that it does not depend on."""
        parameters = {name: self.forward.network.model.get_parameter(name) for name in _parameters(linears)}
        elements = sum(self.targets[number].numel() for number in batches)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                for number in batches:
                    error = self._error(number).div(elements)
                    if error.requires_grad:
                        error.backward()
            found = {name: parameter.grad for name, parameter in parameters.items()}
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        slopes = [(linear.slot, found[linear.slot.parameter]) for linear in linears]
        return [None if slope is None else slot.of(slope) for slot, slope in slopes]

    def loss(self) -> float:
        """The mean squared error over all batches."""
        elements = sum(self.targets[number].numel() for number in range(self.batches))
        return sum(float(self._error(number)) for number in range(self.batches)) / elements

    def _error(self, number: int) -> Tensor:
        """The sum of the squared errors of a batch."""
        output = self.forward.run(number)
        target = self.targets[number].to(output.device)
        return (output.float() - target.float()).square().sum()


def _parameters(linears: Sequence[Linear]) -> list[str]:
    return list(dict.fromkeys(linear.slot.parameter for linear in linears))


class _Silent(Visitor[Any]):
    """Sees nothing of the stream through the model as it was."""

    def written(self, block: Block) -> Read | None:
        return None

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> None:
        return None

    def site(self, site: Any) -> Mapping[Linear, Tensor]:
        return {}

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        return {}


def walk(
    network: Network,
    windows: Sequence[Tensor],
    fitter: Fitter[Any],
    *,
    windows_together: int,
    where: Where = HERE,
    start: Callable[[int], Progress] = lambda steps: lambda done: None,
) -> None:
    """Send windows of tokens through a network and through what it becomes, block by block.

    windows: int64 [length] each, without padding
    windows_together: in a batch at most

    raises: InputError, UsageError
    """
    batches = batches_of(windows, where.batch_tokens, windows_together)
    progress, silent = start(len(batches) * len(network.blocks)), _Silent()
    keep_freed_memory()  # of one step for the next; what a block leaves is given back after it
    places = (where.activations, network.device)
    with torch.no_grad(), hidden_states(*places) as hidden, hidden_states(*places) as exact:
        calls, sites = first_inputs(network, batches, hidden), Sites()
        for number in range(len(batches)):
            exact[number] = hidden[number]
        for block in network.blocks:
            own = [call[block.index] for call in calls]
            read = fitter.written(block)
            working_on(block.name)
            with network.filled(block):
                Forward(network, block, own, exact, silent, lambda done: None).plain()
                forward = Forward(network, block, own, hidden, fitter, progress)
                if read is not None:
                    network.fill(block, read)
                else:
                    _fit(Lesson(forward, exact), sites)
                forward.plain()
            give_back_freed_memory()


def _fit(lesson: Lesson, sites: Sites) -> None:
    forward = lesson.forward
    fitter: Any = forward.visitor
    gathered = gathered_inputs(forward, sites)
    seen = {linear for site in gathered.found for linear in site}
    for site in gathered.sites():
        working_on(site.linears[0].name)
        fitter.site(site)
    working_on(forward.block.name)
    forward.change(fitter.fit(lesson, [linear for linear in forward.block.linears if linear not in seen]))
