"""What a model loses without some of its layers, measured: the loss of many such models in one walk.

Models that lack the same of the first layers share what they compute there, so each layer is filled once and runs
once for each different history before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wtool.block_pass import Call, HiddenStates
from wtool.calibrate import HERE, Progress, Where, batches_of, first_inputs, in_place_of_blocks
from wtool.errors import InputError
from wtool.evaluate import LOGITS, logits_in_pieces
from wtool.memory import give_back_freed_memory, give_back_large_blocks
from wtool.network import Block, Network

Lacks = frozenset[int]


def losses(
    network: Network,
    windows: Sequence[Tensor],
    lacks: Sequence[Collection[int]],
    *,
    where: Where = HERE,
    start: Callable[[int], Progress] = lambda steps: lambda done: None,
) -> list[float]:
    """The mean cross-entropy of the next token, in nats, of models that lack some layers each.

    windows: int64 [length] each
    lacks: for each model the numbers of the layers it lacks
    start: is told how many steps there are and gives the function that is told of each

    raises: InputError where the model does not foretell the next token
    """
    models = [frozenset(each) for each in lacks]
    batches = batches_of(windows, where.batch_tokens)
    progress = start(len(network.blocks) + 1)
    give_back_large_blocks()
    with torch.inference_mode():
        hidden = HiddenStates(network.device, None)
        calls = first_inputs(network, batches, hidden)
        states = {frozenset[int](): [hidden.take(number) for number in range(len(batches))]}
        for block in network.blocks:
            states = _through(network, block, models, states, [call[block.index] for call in calls])
            give_back_freed_memory()
            progress(1)
        with network.filled_on_demand(head=True):
            found = {lack: _loss(network, batches, after) for lack, after in states.items()}
        progress(1)
    return [found[lack] for lack in models]


def _through(
    network: Network,
    block: Block,
    models: Sequence[Lacks],
    states: Mapping[Lacks, list[Tensor]],
    calls: Sequence[Call],
) -> dict[Lacks, list[Tensor]]:
    """Take every history on through a block.

    states: what layers are lacked of those before the block -> hidden states of each batch
    """
    histories = {frozenset(number for number in lack if number <= block.index) for lack in models}
    run = {history for history in histories if block.index not in history}
    after = {history: states[history - {block.index}] for history in histories - run}
    if run:
        with network.filled(block):
            for history in run:
                after[history] = [
                    _output(block, state, call) for state, call in zip(states[history], calls, strict=True)
                ]
    return after


def _output(block: Block, state: Tensor, call: Call) -> Tensor:
    output: Any = block.module(state, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def _loss(network: Network, batches: Sequence[Tensor], states: Sequence[Tensor]) -> float:
    """The mean loss of a model whose last block gave `states`."""
    nats, tokens = 0.0, 0
    for ids, last in zip(batches, states, strict=True):
        with in_place_of_blocks(network, lambda number, state, args, kwargs, last=last: last):
            nats += _nats(network, ids.to(network.device))
        tokens += ids[:, 1:].numel()
    return nats / tokens


def _nats(network: Network, ids: Tensor) -> float:
    """The sum of -log p over the tokens that have one before them."""
    vocabulary = network.model.config.get_text_config().vocab_size
    step = max(1, LOGITS // (vocabulary * len(ids)))
    if network.model.get_output_embeddings() is None:
        raise InputError(f"{network.checkpoint.label}: has no head that foretells the next token")
    nats, begin = 0.0, 0
    for logits in logits_in_pieces(network.model, ids, 0, step):
        targets = ids[:, begin + 1 : begin + 1 + logits.shape[1]]
        logits = logits[:, : targets.shape[1]].float()
        if targets.numel():
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            nats += losses.sum(dtype=torch.float64).item()
        begin += step
    return nats
