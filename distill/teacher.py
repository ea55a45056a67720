"""The teacher, wherever it is: in memory, streamed block by block, or in a cache of what it said."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wtool.checkpoint import Checkpoint
from wtool.checkpoint.tied import embedding_name, head_name, is_tied
from wtool.errors import InputError, UsageError
from wtool.network import Block, Network

from .alignment import Alignment, their_batch
from .body import body_of, full_logits, head_of, is_head_right
from .head import Head
from .relations import projected
from .signal_cache import Cache
from .signals import Online, Targets


@dataclass(frozen=True)
class Whole:
    """All logits of some tokens, of a teacher whose head does more than is known here."""

    logits: Tensor  # [tokens, vocabulary]


@dataclass(frozen=True)
class Said:
    """What a teacher said of a batch."""

    targets: Targets | Whole | None  # of the tokens that are learnt; None where nothing was asked
    states: tuple[Tensor, ...] = ()  # after the embedding and each layer, [windows, tokens, hidden] each
    projected: dict[str, Tensor] = field(default_factory=dict)  # queries, keys, values, [windows, tokens, width] each


SILENT = Said(None)


class Teacher(Protocol):
    """Whoever can be asked what comes next."""

    def say(
        self, inputs: Mapping[str, Tensor], learnt: Tensor, *, all_states: bool = False, layer: int | None = None
    ) -> Said:
        """Tell of the tokens after some positions of a batch.

        inputs: input_ids [windows, tokens], numbers [windows], position_ids [windows, tokens] where there are
        learnt: bool [windows, tokens]; the positions, row after row
        layer: whose queries, keys and values are wanted too
        """
        ...


class OnlineTeacher:
    """A model in memory."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)
        self.exact = is_head_right(self.model)

    @torch.no_grad()
    def say(
        self, inputs: Mapping[str, Tensor], learnt: Tensor, *, all_states: bool = False, layer: int | None = None
    ) -> Said:
        if not self.exact:
            taken = {key: inputs[key] for key in ("input_ids", "position_ids") if key in inputs}
            with projected(self.model, layer) as given:
                output = self.model(**taken, use_cache=False, output_hidden_states=all_states)
            states = tuple(output.hidden_states) if all_states else ()
            return Said(Whole(output.logits[learnt]), states, given)
        head = head_of(self.model)
        assert head is not None
        with projected(self.model, layer) as given:
            output = body_of(self.model, inputs, all_states=all_states)
        states = tuple(output.hidden_states) if all_states else ()
        return Said(Online(output.last_hidden_state[learnt], head), states, given)


class TranslatedTeacher:
    """A model with another tokenizer, which is given the text in its own tokens."""

    def __init__(self, teacher: OnlineTeacher, alignments: Mapping[int, Alignment]):
        self.teacher, self.alignments = teacher, alignments

    def say(
        self, inputs: Mapping[str, Tensor], learnt: Tensor, *, all_states: bool = False, layer: int | None = None
    ) -> Said:
        if not learnt.any():  # on a device that has nothing left
            ids, asked = inputs["input_ids"][:1] * 0, torch.zeros_like(learnt[:1])
        else:
            ids, asked = their_batch(self.alignments, inputs["numbers"].tolist())
        return self.teacher.say({"input_ids": ids.to(learnt.device)}, asked.to(learnt.device))


class StreamedTeacher:
    """A model of which one block at a time is in memory, read again for each batch."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, device: str, trust_remote_code: bool = False):
        self.network = Network(checkpoint, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        self.head = _stored_head(self.network)

    @torch.no_grad()
    def say(
        self, inputs: Mapping[str, Tensor], learnt: Tensor, *, all_states: bool = False, layer: int | None = None
    ) -> Said:
        model = self.network.model
        with self.network.filled_on_demand(), _block_by_block(self.network), projected(model, layer) as given:
            output = body_of(model, inputs, all_states=all_states)
        states = tuple(output.hidden_states) if all_states else ()
        return Said(Online(output.last_hidden_state[learnt], self.head), states, given)


class CachedTeacher:
    """What a teacher said once."""

    def __init__(self, cache: Cache, device: str | torch.device):
        self.cache, self.device = cache, device

    def say(
        self, inputs: Mapping[str, Tensor], learnt: Tensor, *, all_states: bool = False, layer: int | None = None
    ) -> Said:
        if all_states or layer is not None:
            raise UsageError("a cache holds what the teacher said, not its hidden states; name the teacher itself")
        numbers = inputs["numbers"].tolist()
        return Said(self.cache.targets(numbers, learnt.cpu()).to(self.device))


@contextmanager
def _block_by_block(network: Network) -> Iterator[None]:
    """Fill each block when it is called, and empty it when it is through."""

    def streamed(block: Block, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with network.filled(block):
                return run(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        for block in network.blocks:
            block.module.forward = streamed(block, block.module.forward)
            stack.callback(delattr, block.module, "forward")
        yield


def _stored_head(network: Network) -> Head:
    """The head of a model that is not in memory.

    raises: InputError where it is more than a matrix
    """
    checkpoint = network.checkpoint
    found = head_of(network.model)
    tensors = checkpoint.tensors
    tied = embedding_name(tensors) if is_tied(checkpoint.config) else None
    name = tied or head_name(tensors) or embedding_name(tensors)
    if found is None or name is None or tensors[name].shape != tuple(found.weight.shape):
        raise InputError(
            f"{checkpoint.label}: its output head is not known here, so it cannot be streamed as a teacher"
        )

    def read(name: str) -> Tensor:
        return checkpoint.read(name).to(network.device, network.dtype, copy=True)

    bias = name.removesuffix("weight") + "bias"
    return Head(read(name), read(bias) if found.bias is not None else None, found.scale, found.softcap)


def whole_logits(targets: Online | Whole) -> Tensor:
    """All logits of a teacher, [tokens, vocabulary]."""
    return targets.logits if isinstance(targets, Whole) else full_logits(targets.head, targets.hidden)
