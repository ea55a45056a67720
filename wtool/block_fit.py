"""The walk that learns: what a block should give is known, and its linears are fitted to that together.

Two streams of activations go through the model side by side: one through the blocks as they were, one through the
blocks as they have been changed. A block is to make of the second what it made of the first, so that it makes up for
the errors of the blocks before it as far as it can.

    1. the block as it was takes the first stream on, while statistics are gathered; its outputs are the targets
    2. its linears are learned for the second stream, by gradients through this one block (a `Lesson`)
    3. changed for good, it takes the second stream on

In memory are one block, its gradients, its statistics, both streams, and what one batch needs for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wtool.block_pass import Forward, Gathered, HiddenStates, S, Sites, Visitor, gathered_passing
from wtool.calibrate import HERE, Progress, Where, batches_of, first_inputs, hidden_states
from wtool.console import working_on
from wtool.memory import give_back_freed_memory, keep_freed_memory
from wtool.network import Block, Linear, Network
from wtool.stream_norms import gains_after

LEAST = 1e-6  # mean square of a token, of the batch's, that its errors are told by; that of padding is 0


class Fitter(Visitor[S], Protocol):
    """A visitor that fits a block's linears together."""

    def fit(self, lesson: Lesson, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        """Called when all sites of a block were visited, which change nothing; theirs are inputs of the first stream.

        unseen: linears that no token came to
        returns: the matrices [out, in] that take the place of the block's
        """
        ...

    def fitted(self, block: Block, loss: float) -> None:
        """Called when the changed block has run.

        loss: the mean over all batches of the squared errors of its outputs, each as a share of its token's mean
              square, as the norms that come next let them through
        """
        ...


@dataclass(frozen=True)
class Lesson:
    """A filled block, what it is fed, and what it should give for that."""

    forward: Forward
    targets: HiddenStates
    gains: Tensor | None = None  # float32 [features], what its outputs are multiplied by next; None for ones

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
                    output = self.forward.run(number)
                    error = _error(output, self.targets[number], self.gains).div(elements)
                    if error.requires_grad:
                        error.backward()
            found = {name: parameter.grad for name, parameter in parameters.items()}
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        slopes = [(linear.slot, found[linear.slot.parameter]) for linear in linears]
        return [None if slope is None else slot.of(slope) for slot, slope in slopes]


def _error(output: Tensor, target: Tensor, gains: Tensor | None) -> Tensor:
    """The sum of a batch's squared errors, each feature times its gain, as a share of its token's mean square.

    What comes next is a norm, to which a token's length is nothing and a feature is what its weight lets through.
    Without the shares the few tokens that are hundreds of times as long as others would rule the sum (Sun et al.,
    "Massive Activations in Large Language Models", 2024, https://arxiv.org/abs/2402.17762), and without the gains the
    few features that are as long as that, for which norms have small weights.
    """
    target = target.to(output.device).float()
    error = output.float() - target
    if gains is not None:
        factors = gains.to(output.device)
        target, error = target * factors, error * factors
    lengths = target.square().mean(-1, keepdim=True)
    least = LEAST * lengths.mean() + torch.finfo(torch.float32).tiny
    return (error.square() / lengths.clamp_min(least)).sum()


def _parameters(linears: Sequence[Linear]) -> list[str]:
    return list(dict.fromkeys(linear.slot.parameter for linear in linears))


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
    progress = start(len(batches) * len(network.blocks))
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
                before = Forward(network, block, own, exact, fitter, lambda done: None)
                forward = Forward(network, block, own, hidden, fitter, progress)
                lesson = None
                if read is not None:
                    before.plain()
                    network.fill(block, read)
                else:
                    lesson = Lesson(forward, exact, gains_after(before, windows[0]))
                    _fit(gathered_passing(before, sites), lesson)
                forward.plain()
            if lesson is not None:
                fitter.fitted(block, _loss(lesson))
            give_back_freed_memory()


def _loss(lesson: Lesson) -> float:
    """Over all batches, of what the block has given."""
    outputs, targets = lesson.forward.hidden, lesson.targets
    errors = [float(_error(outputs[number], targets[number], lesson.gains)) for number in range(lesson.batches)]
    return sum(errors) / sum(targets[number].numel() for number in range(lesson.batches))


def _fit(gathered: Gathered, lesson: Lesson) -> None:
    forward, unseen = lesson.forward, gathered.unseen()
    fitter: Any = forward.visitor
    for site in gathered.sites():
        working_on(site.linears[0].name)
        fitter.site(site)
    working_on(forward.block.name)
    forward.change(fitter.fit(lesson, unseen))
