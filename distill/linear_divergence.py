"""The divergence of a student's hidden states from its teacher, without the logits of all tokens in memory.

The logits of a few tokens are made, compared, and turned at once into the gradients of hidden states, head and bias,
which the closed form of the derivative allows: no pass over the vocabulary is left for the way back. Liger Kernel does
so for cross-entropy on GPUs: Hsu et al., "Liger Kernel", 2024, https://arxiv.org/abs/2410.10989 (section 3.2,
FusedLinearCrossEntropy). Next to the logits of a few tokens there are the gradient of the head in float32 and, on a
processor, a float32 copy of heads of other types.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from wtool.errors import Mismatch

from .attach import attach
from .formulas import log_probabilities
from .head import Head as Head
from .head import product
from .kinds import Divergence
from .losses import divergence_with_gradient, sampled_with_gradient, top_k_with_gradient
from .signals import Online, Targets, TopK, chunk_for, slices


def linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    targets: Targets | None,
    asked: Divergence,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over tokens of kd_weight * divergence + ce_weight * cross-entropy.

    student_hidden: [tokens, d_s], after the last norm, without tokens that do not count; any float type
    targets:        what the teacher said of the same tokens; None leaves the cross-entropy alone
    labels:         int64 [tokens], the tokens that follow; None leaves the divergence alone
    chunk:          tokens to have logits of at a time; chosen for about 64 MB on a processor, 512 MB on a GPU

    Of vocabularies that differ (by padding, which only the caller can know) the tokens that both have are compared,
    but for uld all. Head and bias get gradients where they require them; tied embeddings get the head's like any.

    returns: the sum, a float32 scalar (float64 of float64) that is 0 with a graph for no token at all;
             and the sums "kd" and "ce" without weights and graph, 0 where not asked for
    raises: Mismatch where numbers of tokens differ
    """
    _check(student_hidden, targets, labels)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        sums = _Sums.over(student_hidden, student_head)
        task = _Task.of(student_hidden, student_head, targets, asked, (kd_weight, ce_weight))
        for rows in slices(len(student_hidden), chunk or chunk_for(student_hidden, task.head.vocabulary)):
            task.add(rows, student_hidden, labels, sums)
        total = kd_weight * sums.kd + ce_weight * sums.ce
    return attach(total, *sums.known(student_hidden, student_head)), {"kd": sums.kd, "ce": sums.ce}


@dataclass
class _Sums:
    """Over the tokens so far: the values, and the gradients that are asked for."""

    kd: Tensor
    ce: Tensor
    hidden: Tensor | None  # [tokens, d_s], of the states' type
    weight: Tensor | None  # [V_s, d_s], float32 or better
    bias: Tensor | None  # [V_s]

    @staticmethod
    def over(hidden: Tensor, head: Head) -> "_Sums":
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        wanted = [tensor is not None and tensor.requires_grad for tensor in (hidden, head.weight, head.bias)]
        empty = torch.zeros((), dtype=dtype, device=hidden.device)
        return _Sums(
            empty,
            empty.clone(),
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(head.weight, dtype=dtype) if wanted[1] else None,
            torch.zeros_like(head.bias, dtype=dtype) if wanted[2] and head.bias is not None else None,
        )

    def add(self, rows: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add what some tokens give.

        gradient: by h Wᵀ, [some tokens, V]
        hidden:   of these tokens; hidden and weight are of the type to multiply in
        """
        if self.bias is not None:
            self.bias[: gradient.shape[1]] += gradient.sum(0)
        gradient = gradient.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = product(gradient, weight).to(self.hidden.dtype)
        if self.weight is not None:
            target = self.weight[: len(weight)]
            if gradient.dtype == target.dtype:
                target.addmm_(gradient.t(), hidden)
            else:
                target.add_(product(gradient.t(), hidden))

    def known(self, hidden: Tensor, head: Head) -> list[tuple[Tensor, Tensor]]:
        """The tensors that require gradients, and these, each of its tensor's type."""
        pairs = ((hidden, self.hidden), (head.weight, self.weight), (head.bias, self.bias))
        return [(each, found.to(each.dtype)) for each, found in pairs if each is not None and found is not None]


@dataclass(frozen=True)
class _Task:
    """What is to be done with each token."""

    head: Head  # ready to be multiplied with, of the common vocabulary
    targets: Targets | None  # within that vocabulary
    asked: Divergence
    beyond: bool  # whether targets may name a token outside it
    weights: tuple[float, float]  # of the divergence and the cross-entropy

    @staticmethod
    def of(
        hidden: Tensor, head: Head, targets: Targets | None, asked: Divergence, weights: tuple[float, float]
    ) -> "_Task":
        beyond = False
        vocabulary = head.vocabulary
        if isinstance(targets, Online):
            theirs = targets.head.vocabulary
            vocabulary = vocabulary if asked.kind == "uld" else min(vocabulary, theirs)
            kept = theirs if asked.kind == "uld" else vocabulary
            ready = targets.head.prepared(targets.hidden, kept)
            targets = Online(targets.hidden.detach().to(ready.weight.dtype), ready)
        elif targets is not None and targets.vocabulary is not None:
            beyond = targets.vocabulary > vocabulary
            vocabulary = min(vocabulary, targets.vocabulary)
            targets = targets.within(vocabulary) if beyond else targets
        return _Task(head.prepared(hidden, vocabulary), targets, asked, beyond, weights)

    def add(self, rows: slice, hidden: Tensor, labels: Tensor | None, sums: _Sums) -> None:
        """Add some tokens of all."""
        some = hidden.detach()[rows].to(self.head.weight.dtype)
        logits = self.head.logits(some)
        gradient = torch.zeros_like(logits) if self.targets is None else self._divergence(logits, rows, sums)
        if labels is not None:
            self._cross_entropy(logits, labels[rows], gradient, sums)
        sums.add(rows, self.head.backward(gradient, logits), some, self.head.weight)

    def _divergence(self, logits: Tensor, rows: slice, sums: _Sums) -> Tensor:
        assert self.targets is not None
        value, gradient = self._said(logits, self.targets.rows(rows))
        sums.kd += value.sum()
        return gradient if self.weights[0] == 1 else gradient.mul_(self.weights[0])

    def _said(self, logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Divergence [some tokens] and its derivative by the logits [some tokens, V]."""
        if isinstance(targets, Online):
            return divergence_with_gradient(logits, targets.head.logits(targets.hidden), self.asked)
        reach = torch.nn.functional.pad(logits, (0, 1), value=-inf) if self.beyond else logits
        if isinstance(targets, TopK):
            value, gradient = top_k_with_gradient(reach, targets.ids, targets.log_probs, targets.tail, self.asked)
        else:
            value, gradient = sampled_with_gradient(
                reach, targets.ids, targets.log_weights, targets.entropy, self.asked
            )
        return value, gradient[:, : logits.shape[1]]

    def _cross_entropy(self, logits: Tensor, labels: Tensor, gradient: Tensor, sums: _Sums) -> None:
        """Add the cross-entropy, and its derivative p_s - 1_label to that of the divergence."""
        logs = log_probabilities(logits)
        sums.ce -= logs.gather(-1, labels[:, None]).sum()
        gradient.add_(logs.exp_(), alpha=self.weights[1])
        gradient.scatter_add_(-1, labels[:, None], gradient.new_full((len(labels), 1), -self.weights[1]))


def _check(hidden: Tensor, targets: Targets | None, labels: Tensor | None) -> None:
    counts = {"labels": None if labels is None else len(labels)}
    if targets is not None:
        counts["the teacher's signal"] = len(targets.hidden if isinstance(targets, Online) else targets.ids)
    for what, count in counts.items():
        if count not in (None, len(hidden)):
            raise Mismatch(f"the student has {len(hidden)} tokens, {what} {count}; they must be the same tokens")
