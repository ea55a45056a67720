"""What a student's forward gives in training: sums over tokens of what is to be made small.

They are sums, not means: the Trainer divides by the tokens of the whole step, over all forwards and all devices, so
that a step is the same however it is cut into batches. They are computed inside the model's forward, because where
parameters are sharded the head's are there only then.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wtool.errors import Mismatch

from .body import at_head, body_of
from .data import IGNORED
from .head import Head
from .hidden_states import hidden_cosine, hidden_mse
from .kinds import Divergence
from .linear_divergence import linear_divergence
from .losses import divergence, sampled_divergence, top_k_divergence
from .relations import projected, relations_apart
from .signals import Online, Sampled, Targets, TopK
from .teacher import Said, Whole, whole_logits

Sums = dict[str, Tensor]  # loss, with its gradient; and without: kd, ce, hidden, relations, each unweighted
PROJECTORS = "hidden_state_projectors"  # a part of the model while it is trained, and not of what is saved


@dataclass(frozen=True)
class Wanted:
    """What is to be made small."""

    divergence: Divergence
    kd: float = 1.0  # weight of the divergence
    ce: float = 0.0  # weight of the cross-entropy with the text
    hidden: str = "none"  # mse, cosine: of hidden states
    hidden_weight: float = 1.0
    layers: tuple[tuple[int, int], ...] = ()  # a layer of the student, and the teacher's that it is compared with
    relations: float = 0.0  # weight of the relations between tokens
    related: tuple[int, int] = (-1, -1)  # the layers whose relations these are
    relation_heads: int = 1  # the most

    @property
    def of_teacher(self) -> bool:
        """Whether the teacher is needed at all."""
        return bool(self.kd or self.relations or self.hidden != "none")


def give_objective(model: PreTrainedModel) -> None:
    """Let a model's forward take `objective`, a function of the model, and return what that returns."""
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, objective: Callable[[PreTrainedModel], Sums] | None = None, **inputs: Any) -> Any:
        return own(*args, **inputs) if objective is None else objective(model)

    model.forward = forward


def token_sums(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], said: Said, wanted: Wanted, *, exact_head: bool
) -> Sums:
    """Run a student on a batch, and add up what is wanted over the tokens that have a label.

    inputs: as `data.Collate` lays them out
    exact_head: whether `head_of` tells all that becomes of the student's hidden states

    returns: scalars; zeros with a gradient where no token has a label
    """
    learnt = inputs["labels"] != IGNORED
    labels = inputs["labels"][learnt]
    targets = said.targets if wanted.kd else None
    states = wanted.hidden != "none"
    with projected(model, wanted.related[0] if wanted.relations else None) as given:
        if exact_head and not isinstance(targets, Whole):
            output = body_of(model, inputs, all_states=states)
            loss, kd, ce = at_head(model, output.last_hidden_state[learnt], _at_head(targets, labels, wanted))
            parts = {"kd": kd, "ce": ce} if wanted.kd else {"ce": ce}
        else:
            taken = {key: inputs[key] for key in ("input_ids", "position_ids") if key in inputs}
            output: Any = type(model).forward(model, **taken, use_cache=False, output_hidden_states=states)
            loss, parts = dense_sums(output.logits[learnt], targets, labels, wanted)
    if wanted.relations:
        apart = relations_apart(given, said.projected, learnt, wanted.relation_heads)
        loss = loss + wanted.relations * apart
        parts = {**parts, "relations": apart.detach()}
    if wanted.hidden != "none":
        apart = _states_apart(model, output.hidden_states, said.states, learnt, wanted)
        loss = loss + wanted.hidden_weight * apart
        parts = {**parts, "hidden": apart.detach()}
    return {"loss": loss, **parts}


def _at_head(targets: Targets | None, labels: Tensor, wanted: Wanted) -> Callable[[Tensor, Head], tuple[Tensor, ...]]:
    def run(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        loss, parts = linear_divergence(
            hidden, head, targets, wanted.divergence, labels=labels, ce_weight=wanted.ce, kd_weight=wanted.kd
        )
        return loss, parts["kd"], parts["ce"]

    return run


def dense_sums(
    logits: Tensor, targets: Targets | Whole | None, labels: Tensor, wanted: Wanted
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `linear_divergence`, from logits that are all there.

    logits: [tokens, vocabulary]
    targets: None leaves the cross-entropy alone
    labels: int64 [tokens]
    """
    ce = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    if targets is None:
        return wanted.ce * ce, {"ce": ce.detach()}
    if isinstance(targets, TopK | Sampled) and (targets.vocabulary or 0) > logits.shape[-1]:
        raise Mismatch(f"the cache's teacher has {targets.vocabulary} tokens, the student {logits.shape[-1]} logits")
    match targets:
        case Online() | Whole():
            theirs = whole_logits(targets)
            common = None if wanted.divergence.kind == "uld" else min(logits.shape[-1], theirs.shape[-1])
            each = divergence(logits[:, :common], theirs[:, :common], wanted.divergence)
        case TopK():
            each = top_k_divergence(logits, targets.ids, targets.log_probs, targets.tail, wanted.divergence)
        case Sampled():
            each = sampled_divergence(logits, targets.ids, targets.log_weights, targets.entropy, wanted.divergence)
    kd = each.sum()
    return wanted.kd * kd + wanted.ce * ce, {"kd": kd.detach(), "ce": ce.detach()}


def layer_map(ours: int, theirs: int, kept: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """Which of the teacher's layers each of the student's is compared with.

    kept: the teacher's layers that the student was made of; its layers then are compared with the last teacher's layer
          before the next of them, which is where the student's output is to be. None spaces them evenly.
    """
    if kept is not None:
        ends = [*(following - 1 for following in kept[1:]), theirs - 1]
        return tuple(enumerate(max(layer, end) for layer, end in zip(kept, ends, strict=True)))
    return tuple((layer, (layer + 1) * theirs // ours - 1) for layer in range(ours))


def give_projectors(model: PreTrainedModel, ours: int, theirs: int, wanted: Wanted, seed: int) -> None:
    """Where widths differ, add matrices [theirs, ours] that bring the student's hidden states to the teacher's."""
    if wanted.hidden == "none" or ours == theirs:
        return
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(theirs, ours, generator=generator) / ours**0.5 for _ in wanted.layers]
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    model.register_module(PROJECTORS, nn.ParameterList([each.to(like.device, like.dtype) for each in made]))


def _states_apart(
    model: PreTrainedModel, ours: Sequence[Tensor], theirs: Sequence[Tensor], learnt: Tensor, wanted: Wanted
) -> Tensor:
    """The sum over tokens of the mean over layers."""
    compare = hidden_mse if wanted.hidden == "mse" else hidden_cosine
    projectors: Any = getattr(model, PROJECTORS, [None] * len(wanted.layers))
    total = ours[0].new_zeros((), dtype=torch.float32)
    for (layer, place), projector in zip(wanted.layers, projectors, strict=True):
        total = total + compare(ours[layer + 1][learnt], theirs[place + 1][learnt], projector).sum()
    return total / len(wanted.layers)
