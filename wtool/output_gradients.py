"""How much a model's answer hangs on each output of its linears: mean squared gradients, gathered block by block.

For a token drawn at every position from the model's own next-token distribution, g is the gradient of the sum of
log p over positions by the outputs of a linear, and g[r]² the diagonal of the Fisher information of these outputs, by
which half the square of a small change of theirs is weighted in the Kullback-Leibler divergence that the change makes
(see Martens, "New insights and perspectives on the natural gradient method", 2014, https://arxiv.org/abs/1412.1193,
sections 5 and 9.2). What is gathered for each output r is a mean over tokens that can be multiplied by the mean of e²,
the error of the output: of g[r]² e² it is the mean where e² is in proportion to the input's |x|²,

    s[r] = Σ_t |x_t|² g_t[r]² / Σ_t |x_t|².

A plain mean of g² would be ruled by tokens that put out next to nothing before a norm (the first one, in Gemma's
down_proj): to them the answer is most sensitive, and their errors are as small as they are.

It is back-propagation with one block in memory: forward through all blocks, what each is fed being kept; the head's
gradient; then the blocks from the last to the first, each run again with gradients. So it costs about four forwards,
on few windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wtool.block_pass import WATCHED, Call, HiddenStates
from wtool.calibrate import HERE, Progress, Where, batches_of, first_inputs, hidden_states, in_place_of_blocks
from wtool.console import working_on
from wtool.errors import InputError
from wtool.evaluate import LOGITS, logits_in_pieces
from wtool.memory import give_back_freed_memory, give_back_large_blocks
from wtool.network import Block, Linear, Network, Regions

Sums = dict[str, Tensor]
TINY = 1e-300  # so that inputs that are all 0 divide nothing by 0


def squared_gradients(
    network: Network,
    windows: Sequence[Tensor],
    *,
    seed: int = 0,
    where: Where = HERE,
    start: Callable[[int], Progress] = lambda steps: lambda done: None,
) -> dict[str, Tensor]:
    """The mean squared gradient s by each output of each linear that a token came to, float32 [out], in nats².

    windows: int64 [length] each
    seed: of the tokens that are drawn
    start: is told how many steps there are and gives the function that is told of each

    raises: InputError where the model does not foretell the next token
    """
    batches = batches_of(windows, where.batch_tokens)
    blocks, count = network.blocks, len(batches)
    progress = start(2 * len(blocks) + 1)
    give_back_large_blocks()
    sums: Sums = {}
    energies: dict[str, Tensor] = {}  # the sums of |x|²
    with torch.no_grad(), hidden_states(where.activations, network.device) as hidden:
        calls = first_inputs(network, batches, hidden)
        for block in blocks:
            with network.filled(block):
                for number, call in enumerate(calls):
                    fed = hidden[block.index * count + number].to(network.device)
                    hidden[(block.index + 1) * count + number] = _output(block, fed, call[block.index])
            progress(1)
        gradients = _of_head(network, batches, hidden, len(blocks) * count, seed)
        progress(1)
        for block in reversed(blocks):
            working_on(block.name)
            fed = [hidden.take(block.index * count + number) for number in range(count)]
            with network.filled(block):
                own = [call[block.index] for call in calls]
                gradients = _back(network, block, fed, own, gradients, sums, energies)
            give_back_freed_memory()
            progress(1)
    return {name: (total / energies[name].clamp(min=TINY)).float().cpu() for name, total in sums.items()}


def _output(block: Block, state: Tensor, call: Call) -> Tensor:
    output: Any = block.module(state, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def _of_head(network: Network, batches: Sequence[Tensor], hidden: HiddenStates, first: int, seed: int) -> list[Tensor]:
    """The gradient by what the last block gave, for each batch; `first` is the number of the first batch's."""
    if network.model.get_output_embeddings() is None:
        raise InputError(f"{network.checkpoint.label}: has no head that foretells the next token")
    vocabulary = network.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    with network.filled_on_demand(head=True), torch.enable_grad():
        for number, ids in enumerate(batches):
            last = hidden.take(first + number).to(network.device).detach().requires_grad_()
            step = max(1, LOGITS // (vocabulary * len(ids)))
            with in_place_of_blocks(network, lambda number, state, args, kwargs, last=last: last):
                for logits in logits_in_pieces(network.model, ids.to(network.device), 0, step):
                    _score(logits, generator).backward(retain_graph=True)
            assert last.grad is not None
            found.append(last.grad)
    return found


def _score(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The log-probability of tokens drawn from the distributions [windows, tokens, vocabulary], summed."""
    scores = logits.float().log_softmax(-1).flatten(0, 1)
    chance = torch.rand(len(scores), generator=generator, dtype=torch.float64).to(scores.device)
    reached = scores.detach().exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(reached, (chance * reached[:, -1])[:, None]).clamp(max=scores.shape[-1] - 1)
    return scores.gather(-1, drawn).sum()


def _back(
    network: Network,
    block: Block,
    states: Sequence[Tensor],
    calls: Sequence[Call],
    gradients: Sequence[Tensor],
    sums: Sums,
    energies: Sums,
) -> list[Tensor]:
    """Take gradients from a block's outputs to its inputs, and gather those of its linears' outputs on the way."""

    def add(linears: tuple[Linear, ...], fed: Tensor, gradient: Tensor) -> None:
        lengths = fed.detach().float().square().sum(-1).flatten()
        squares = (gradient.reshape(len(lengths), -1).float().square().t() @ lengths).double()
        energy = lengths.sum(dtype=torch.float64)
        for linear, part in zip(linears, squares.split([linear.shape[0] for linear in linears]), strict=True):
            sums[linear.name] = sums[linear.name] + part if linear.name in sums else part
            energies[linear.name] = energies[linear.name] + energy if linear.name in energies else energy

    before: list[Tensor] = []
    with torch.enable_grad():
        for state, call, gradient in zip(states, calls, gradients, strict=True):
            fed = state.to(network.device).detach().requires_grad_()
            with _Watch(Regions(network, block.linears), add):
                output = _output(block, fed, call)
            output.backward(gradient.to(output.dtype))
            assert fed.grad is not None
            before.append(fed.grad)
    return before


class _Watch(TorchFunctionMode):
    """Tells of the gradient by the outputs of every product with a block's linears, when it is known."""

    def __init__(self, regions: Regions, add: Callable[[tuple[Linear, ...], Tensor, Tensor], None]):
        super().__init__()
        self._regions, self._add = regions, add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if places := WATCHED.get(func):
            fed, weight = (args[place] if place < len(args) else kwargs.get(name) for place, name in places)
            if isinstance(weight, Tensor) and (linears := self._regions.of(weight)) and output.requires_grad:
                output.register_hook(lambda gradient: self._add(linears, fed, gradient))
        return output
