"""What a teacher said of some tokens: all of it, its most likely tokens, or a sample of its tokens.

The sample is drawn so that the mean over all samples is the teacher's distribution, as sparse logit sampling asks
(Anshumann et al., 2025, https://arxiv.org/abs/2503.16870), with less noise than independent draws have: token i is in a
sample of k with the chance min(1, c p_i), and weighs p_i over its chance (Horvitz and Thompson, "A Generalization of
Sampling Without Replacement from a Finite Universe", 1952). c is such that k are drawn, so that the likeliest tokens
are always there with their own probability, each of the others weighs 1 / c, and the weights add up to 1. The others
are found at equal steps along the sum of their probabilities, from a random start (Madow, "On the Theory of Systematic
Sampling, II", 1949), so none is drawn twice.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import TypeVar

import torch
from torch import Tensor

from .formulas import log_probabilities
from .head import Head

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of logits and what is made of them, at a time
_BUFFERS = 5  # as large as the logits, at most at one time


@dataclass(frozen=True)
class Online:
    """The teacher's last hidden states, of which its head makes logits.

    hidden: [tokens, d_t], after the last norm
    """

    hidden: Tensor
    head: Head

    def rows(self, rows: slice) -> "Online":
        return replace(self, hidden=self.hidden[rows])


@dataclass(frozen=True)
class TopK:
    """The most likely tokens.

    ids:        int64 [tokens, k], different in each row, the most likely first
    log_probs:  [tokens, k], of the teacher's logits divided by the temperature of the loss
    tail:       log of the mass on all other tokens [tokens], -inf where there is none; None where it is not known
    vocabulary: how many tokens the teacher chose among; None where that is the student's number
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor | None
    vocabulary: int | None = None

    def rows(self, rows: slice | Tensor) -> "TopK":
        tail = None if self.tail is None else self.tail[rows]
        return replace(self, ids=self.ids[rows], log_probs=self.log_probs[rows], tail=tail)

    def to(self, device: torch.device | str) -> "TopK":
        tail = None if self.tail is None else self.tail.to(device)
        return replace(self, ids=self.ids.to(device), log_probs=self.log_probs.to(device), tail=tail)

    def within(self, vocabulary: int) -> "TopK":
        """Without tokens from `vocabulary` on, whose mass goes to all the others; their ids become `vocabulary`."""
        log_probs = self.log_probs.masked_fill(self.ids >= vocabulary, -inf)
        total = log_probs.logsumexp(-1)
        total = total if self.tail is None else torch.logaddexp(total, self.tail)
        before = self.log_probs.logsumexp(-1) if self.tail is None else torch.zeros_like(total)
        tail = None if self.tail is None else self.tail - total
        log_probs = log_probs + (before - total)[:, None]
        return TopK(self.ids.clamp(max=vocabulary), log_probs, tail, vocabulary)


@dataclass(frozen=True)
class Sampled:
    """A sample of tokens, whose weights are the teacher's probabilities in the mean over all samples.

    ids:         int64 [tokens, k], different in each row, the heaviest first
    log_weights: [tokens, k], at the temperature of the loss; the weights of a row add up to 1
    entropy:     of the teacher [tokens], in nats, at that temperature
    vocabulary:  how many tokens the teacher chose among; None where that is the student's number
    """

    ids: Tensor
    log_weights: Tensor
    entropy: Tensor
    vocabulary: int | None = None

    def rows(self, rows: slice | Tensor) -> "Sampled":
        parts = self.ids[rows], self.log_weights[rows], self.entropy[rows]
        return Sampled(*parts, self.vocabulary)

    def to(self, device: torch.device | str) -> "Sampled":
        parts = self.ids.to(device), self.log_weights.to(device), self.entropy.to(device)
        return Sampled(*parts, self.vocabulary)

    def within(self, vocabulary: int) -> "Sampled":
        """Without tokens from `vocabulary` on, whose weight goes to all the others; their ids become `vocabulary`."""
        log_weights = self.log_weights.masked_fill(self.ids >= vocabulary, -inf).log_softmax(-1)
        return Sampled(self.ids.clamp(max=vocabulary), log_weights, self.entropy, vocabulary)


Kept = TopK | Sampled
Targets = Online | TopK | Sampled
_Kept = TypeVar("_Kept", TopK, Sampled)


def top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k most likely tokens and the mass of the others.

    logits: [tokens, V]; k is at most V, a larger one is taken for V
    """
    vocabulary = logits.shape[-1]
    logs = log_probabilities(logits, temperature)
    found = logs.topk(min(k, vocabulary))
    tail = logs.scatter_(-1, found.indices, -inf).logsumexp(-1)
    return TopK(found.indices, found.values, tail, vocabulary)


def sample(logits: Tensor, k: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Sampled:
    """A sample of k different tokens.

    logits: [tokens, V]; k is at most V, a larger one is taken for V
    generator: on the device of the logits
    """
    vocabulary = logits.shape[-1]
    logs = log_probabilities(logits, temperature).double()
    probabilities = logs.exp()
    entropy = -(probabilities * logs).sum(-1).float()
    found = probabilities.topk(min(k, vocabulary))
    places = torch.arange(found.values.shape[-1], device=logits.device)
    left = found.values.flip(-1).cumsum(-1).flip(-1)  # of the k likeliest, from each place on
    others = probabilities.scatter(-1, found.indices, 0.0).sum(-1, keepdim=True)
    always = (found.values * (len(places) - places) >= left + others).sum(-1, keepdim=True)  # in every sample
    kept = places < always
    of_others = probabilities.scatter(-1, found.indices, found.values.masked_fill(kept, 0.0))
    along = of_others.cumsum(-1)
    step = along[:, -1:] / (len(places) - always).clamp(min=1)  # 1 / c
    start = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator, device=logits.device)
    drawn = torch.searchsorted(along, (places - always + start).clamp(min=0) * step, right=True)
    ids = found.indices.where(kept, drawn.clamp(max=vocabulary - 1))
    return Sampled(ids, found.values.where(kept, step).log().float(), entropy, vocabulary)


def of_hidden(hidden: Tensor, head: Head, tell: Callable[[Tensor], _Kept], *, chunk: int | None = None) -> _Kept:
    """What `tell` makes of the logits, which are never whole in memory.

    hidden: [tokens, d_t], at least one token
    tell:   logits [some tokens, V] -> what to keep of them, such as `top_k` or `sample`
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        ready = head.prepared(hidden, head.vocabulary)
        parts = [
            tell(ready.logits(hidden[rows].detach().to(ready.weight.dtype)))
            for rows in slices(len(hidden), chunk or chunk_for(hidden, head.vocabulary))
        ]
    return join(parts)


def join(parts: Iterable[_Kept]) -> _Kept:
    """Several parts as one; all of one vocabulary, and all with tails or none."""
    first, *others = parts
    if not others:
        return first
    names = ("ids", "log_probs", "tail") if isinstance(first, TopK) else ("ids", "log_weights", "entropy")
    columns = {name: [getattr(each, name) for each in (first, *others)] for name in names}
    return replace(first, **{name: None if each[0] is None else torch.cat(each) for name, each in columns.items()})


def chunk_for(hidden: Tensor, vocabulary: int) -> int:
    """How many tokens to have logits of at a time."""
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    return max(32, budget // (vocabulary * 4 * _BUFFERS))


def slices(count: int, chunk: int) -> Iterator[slice]:
    """0 to count in pieces of `chunk`."""
    return (slice(begin, min(begin + chunk, count)) for begin in range(0, count, chunk))
