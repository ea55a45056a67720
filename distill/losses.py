"""Divergences between a student's logits and what a teacher said, each with its derivative in closed form.

The formulas are in `formulas.py`. With temperature τ both logits are divided by τ and the value is multiplied by τ²,
as Hinton, Vinyals and Dean, 2015, https://arxiv.org/abs/1503.02531 do, so that gradients keep their size next to a
cross-entropy; the derivative is then τ times that by the divided logits.

Of a teacher whose k most likely tokens are known, and the mass 1 - P of all others, the divergence is that of k + 1
outcomes: the k tokens, and "another". It is a true divergence, never above the full one and equal to it at k = V (the
data processing inequality), and its derivative shares that of "another" out by the student's own probabilities.
"""

from math import inf

import torch
from torch import Tensor

from wtool.errors import UsageError

from .attach import attach
from .formulas import LOWEST, compare, log_probabilities, through_softmax, working_dtype
from .kinds import KINDS as KINDS
from .kinds import Divergence as Divergence


def divergence(student: Tensor, teacher: Tensor, asked: Divergence) -> Tensor:
    """The divergence of each token.

    student, teacher: logits [tokens, V], of any float type; V may differ for uld only
    returns: [tokens], float32 (float64 of float64), differentiable once with respect to the student
    """
    value, gradient = divergence_with_gradient(student.detach(), teacher, asked)
    return attach(value, (student, gradient.to(student.dtype)))


@torch.no_grad()
def divergence_with_gradient(student: Tensor, teacher: Tensor, asked: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence of each token [tokens], and its derivative by the student's logits [tokens, V], without a graph.

    student, teacher: logits [tokens, V]; they are not changed
    """
    ls = log_probabilities(student, asked.temperature)
    value, slopes = compare(ls, log_probabilities(teacher, asked.temperature), asked)
    gradient = through_softmax(ls, slopes)
    return _scaled_back(value, gradient, asked.temperature)


def top_k_divergence(student: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor | None, asked: Divergence) -> Tensor:
    """The divergence of each token [tokens] from a teacher of whom k tokens are known, differentiable once.

    student:   logits [tokens, V]
    ids:       int64 [tokens, k], different in each row
    log_probs: the teacher's log-probabilities of them [tokens, k], of its logits divided by the temperature asked for
    tail:      log of the teacher's mass on all others [tokens], -inf where there is none; None leaves the k terms of
               forward-kl alone, which is no divergence: it may be negative

    raises: UsageError for uld, and without tail for all but forward-kl
    """
    value, gradient = top_k_with_gradient(student.detach(), ids, log_probs, tail, asked)
    return attach(value, (student, gradient.to(student.dtype)))


@torch.no_grad()
def top_k_with_gradient(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail: Tensor | None, asked: Divergence
) -> tuple[Tensor, Tensor]:
    """As `top_k_divergence`, with the derivative by the student's logits [tokens, V], without a graph."""
    _check_partial(asked, whole=tail is not None)
    dtype = working_dtype(student)
    rest = student.to(dtype, copy=True).div_(asked.temperature)
    chosen = rest.gather(-1, ids)
    rest.scatter_(-1, ids, -inf)
    outside = rest.logsumexp(-1, keepdim=True)  # [tokens, 1], -inf at k = V
    total = torch.logaddexp(outside, chosen.logsumexp(-1, keepdim=True))
    ls = torch.cat([chosen, outside], -1).sub_(total).clamp_(min=LOWEST)  # [tokens, k + 1]
    lt = log_probs if tail is None else torch.cat([log_probs, tail[:, None]], -1)
    value, slopes = compare(ls[:, : lt.shape[-1]], lt.to(dtype, copy=True).clamp_(min=LOWEST), asked)
    if tail is None:
        slopes = torch.nn.functional.pad(slopes, (0, 1))
    gradient = through_softmax(ls, slopes)
    whole = rest.sub_(outside.clamp_(min=LOWEST)).exp_().mul_(gradient[:, -1:])  # 0 at the ids
    return _scaled_back(value, whole.scatter_add_(-1, ids, gradient[:, :-1]), asked.temperature)


def sampled_divergence(student: Tensor, ids: Tensor, log_weights: Tensor, entropy: Tensor, asked: Divergence) -> Tensor:
    """An unbiased estimate of the forward KL of each token [tokens], from a sample of the teacher's tokens.

    Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025,
    https://arxiv.org/abs/2503.16870 (section 4). With E[Σ w_i 1_i] = p_t, the expectation of -Σ w_i ls_i - entropy is
    the KL, and that of its derivative the KL's.

    student:     logits [tokens, V]
    ids:         int64 [tokens, k], different in each row
    log_weights: logs of the weights w [tokens, k]; their sum is 1 in each row
    entropy:     of the teacher [tokens], in nats; all at the temperature asked for

    returns: differentiable once with respect to the student
    raises: UsageError for all but forward-kl, which alone is linear in the teacher
    """
    value, gradient = sampled_with_gradient(student.detach(), ids, log_weights, entropy, asked)
    return attach(value, (student, gradient.to(student.dtype)))


@torch.no_grad()
def sampled_with_gradient(
    student: Tensor, ids: Tensor, log_weights: Tensor, entropy: Tensor, asked: Divergence
) -> tuple[Tensor, Tensor]:
    """As `sampled_divergence`, with the derivative by the student's logits [tokens, V], without a graph."""
    value, gradient = top_k_with_gradient(student, ids, log_weights, None, asked)
    logs = log_weights.to(value.dtype).clamp(min=LOWEST)
    own = (logs.exp() * logs).sum(-1)
    return value - (own + entropy) * asked.temperature**2, gradient


def _check_partial(asked: Divergence, *, whole: bool) -> None:
    if asked.kind == "uld":
        raise UsageError("loss 'uld' needs all of the teacher's probabilities, not a cache of some")
    if not whole and not _is_forward_kl(asked):
        raise UsageError(
            f"loss '{asked.kind}' needs the teacher's mass outside the cached tokens; without it, or of a sample, "
            "there is forward-kl only"
        )


def _is_forward_kl(asked: Divergence) -> bool:
    return asked.kind == "forward-kl" or (asked.kind == "jsd" and asked.beta == 0)


def _scaled_back(value: Tensor, gradient: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature != 1:
        value, gradient = value.mul_(temperature**2), gradient.mul_(temperature)
    return value, gradient
