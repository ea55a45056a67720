"""The divergences as formulas of two lists of log-probabilities, each with its derivative.

Every function takes ls and lt, the logs of the student's and the teacher's probabilities p_s and p_t [tokens, n], and
may overwrite lt. It gives

    value   [tokens]      D
    slopes  [tokens, n]   w = p_s dD/dp_s; up to a multiple of p_s, which `through_softmax` takes out

so that the derivative by the student's logits is w - p_s Σ w, for any D. All is made of exponentials of logs that are
at most 0, and of differences of logs: nothing divides by a probability, and one that underflows leaves a 0.

forward-kl, reverse-kl  Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
                        https://arxiv.org/abs/1503.02531; Gu, Dong, Wei and Huang, "MiniLLM", 2023,
                        https://arxiv.org/abs/2306.08543
jsd                     Agarwal et al., "On-Policy Distillation of Language Models", 2023,
                        https://arxiv.org/abs/2306.13649 (section 2, with m = β p_t + (1 - β) p_s)
skew-kl and its reverse Ko, Kim, Chen and Yun, "DistiLLM", 2024, https://arxiv.org/abs/2402.03898 (section 3.1)
tvd                     Wen, Li, Du and Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
                        2023, https://arxiv.org/abs/2307.15190
uld                     Boizard, El Haddad, Hudelot and Colombo, "Towards Cross-Tokenizer Distillation", 2024,
                        https://arxiv.org/abs/2402.12030 (the term of the logits)
"""

from math import inf, log

import torch
from torch import Tensor

from .kinds import Divergence

LOWEST = -1e30  # stands for the log of 0: 0 times it is 0, and the difference of two of them too

Pair = tuple[Tensor, Tensor]


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logs of the softmax of logits / temperature, in new memory, float64 of float64 and float32 of all else."""
    dtype = working_dtype(logits)
    scaled = logits.to(dtype) if temperature == 1 else logits.to(dtype) / temperature
    return scaled.log_softmax(-1).clamp_(min=LOWEST)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The type to compute in: float32, or better where better is given."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def compare(ls: Tensor, lt: Tensor, asked: Divergence) -> Pair:
    """Value and slopes of the divergence asked for, without its temperature; overwrites lt."""
    kind = asked.kind
    if kind == "jsd" and asked.beta in (0, 1):  # the limits of the formula are 0 there, those of D / (β (1 - β)) not
        kind = "reverse-kl" if asked.beta else "forward-kl"
    match kind:
        case "forward-kl":
            return _forward_kl(ls, lt)
        case "reverse-kl":
            return _reverse_kl(ls, lt)
        case "jsd":
            return _jsd(ls, lt, asked.beta)
        case "skew-kl":
            return _skew_kl(ls, lt, asked.alpha)
        case "skew-reverse-kl":
            return _skew_reverse_kl(ls, lt, asked.alpha)
        case "tvd":
            return _tvd(ls, lt)
        case _:
            return _uld(ls, lt)


def through_softmax(ls: Tensor, slopes: Tensor) -> Tensor:
    """The derivative by the logits, of the slopes; overwrites both."""
    total = slopes.sum(-1, keepdim=True)
    return slopes.addcmul_(ls.exp_(), total, value=-1)


def _forward_kl(ls: Tensor, lt: Tensor) -> Pair:
    """Σ p_t (lt - ls); w = -p_t."""
    teacher = lt.exp()
    value = lt.sub_(ls).mul_(teacher).sum(-1)
    return value, teacher.neg_()


def _reverse_kl(ls: Tensor, lt: Tensor) -> Pair:
    """Σ p_s (ls - lt); w = p_s (ls - lt)."""
    slopes = torch.sub(ls, lt, out=lt).mul_(ls.exp())
    return slopes.sum(-1), slopes


def _jsd(ls: Tensor, lt: Tensor, beta: float) -> Pair:
    """With m = β p_t + (1 - β) p_s, β Σ p_t (lt - lm) + (1 - β) Σ p_s (ls - lm); w = (1 - β) p_s (ls - lm)."""
    lm = _mixture(ls, lt, beta)
    teacher = lt.exp()
    of_teacher = lt.sub_(lm).mul_(teacher).sum(-1)
    slopes = torch.sub(ls, lm, out=lm).mul_(ls.exp()).mul_(1 - beta)
    return beta * of_teacher + slopes.sum(-1), slopes


def _skew_kl(ls: Tensor, lt: Tensor, alpha: float) -> Pair:
    """With m = α p_t + (1 - α) p_s, Σ p_t (lt - lm); w = -(1 - α) p_s p_t / m."""
    lm = _mixture(ls, lt, alpha)
    fall = lt - lm
    value = lt.exp().mul_(fall).sum(-1)
    return value, fall.add_(ls).exp_().mul_(alpha - 1)


def _skew_reverse_kl(ls: Tensor, lt: Tensor, alpha: float) -> Pair:
    """With m = (1 - α) p_t + α p_s, Σ p_s (ls - lm); w = p_s (ls - lm) - α p_s² / m."""
    fall = ls - _mixture(ls, lt, 1 - alpha)
    slopes = ls.exp().mul_(fall)
    value = slopes.sum(-1)
    return value, slopes.sub_(fall.add_(ls).add_(_log(alpha)).exp_())


def _tvd(ls: Tensor, lt: Tensor) -> Pair:
    """½ Σ |p_s - p_t|; w = ½ p_s sign(p_s - p_t)."""
    student = ls.exp()
    apart = student - lt.exp_()
    value = apart.abs().sum(-1) / 2
    return value, student.mul_(apart.sign_()).div_(2)


def _uld(ls: Tensor, lt: Tensor) -> Pair:
    """Σ |i-th largest p_s - i-th largest p_t|, the shorter list continued with zeros; w = p_s sign of that."""
    student, order = ls.exp().sort(descending=True)
    teacher = lt.exp_().sort(descending=True).values
    common = min(student.shape[-1], teacher.shape[-1])
    apart = student.clone()
    apart[..., :common] -= teacher[..., :common]
    value = apart.abs().sum(-1) + teacher[..., common:].sum(-1)
    return value, torch.empty_like(ls).scatter_(-1, order, student.mul_(apart.sign_()))


def _mixture(ls: Tensor, lt: Tensor, share: float) -> Tensor:
    """Logs of (1 - share) p_s + share p_t."""
    return torch.logaddexp(ls + _log(1 - share), lt + _log(share))


def _log(share: float) -> float:
    return log(share) if share else -inf
