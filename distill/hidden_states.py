"""How far a student's hidden states are from its teacher's, or how far the relations between their tokens are.

For states of other widths, a projector without bias brings the student's to the teacher's: Jiao et al., "TinyBERT",
2019, https://arxiv.org/abs/1909.10351 (equation 8); the cosine is that of Sanh, Debut, Chaumond and Wolf,
"DistilBERT", 2019, https://arxiv.org/abs/1910.01108 (section 2). The relations are those of Wang, Bao, Huang, Dong and
Wei, "MiniLMv2", 2020, https://arxiv.org/abs/2012.15828 (section 3.1): widths may differ, and no projector is needed.

All is differentiable by the student's states and the projector, and computed in float32 or better.
"""

import torch
from torch import Tensor

from wtool.errors import Mismatch, UsageError

from .formulas import working_dtype


def hidden_mse(student: Tensor, teacher: Tensor, projector: Tensor | None = None) -> Tensor:
    """Mean over the features of the squared difference.

    student:   [tokens, d_s]
    teacher:   [tokens, d_t]
    projector: [d_t, d_s]; needed where the widths differ
    returns:   [tokens], float32 or better
    raises: Mismatch
    """
    ours, theirs = _comparable(student, teacher, projector)
    return (ours - theirs).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor, projector: Tensor | None = None) -> Tensor:
    """1 - cosine of the angle between the states, in [0, 2]; 1 where one of them is 0.

    Arguments, result and errors are those of `hidden_mse`.
    """
    ours, theirs = _comparable(student, teacher, projector)
    return 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)


def relation_divergence(student: Tensor, teacher: Tensor, *, heads: int, causal: bool = False) -> Tensor:
    """KL of the student's relations between tokens from the teacher's: of queries, keys or values, each with itself.

    student: [..., tokens, d_s], the tokens of one sequence; all attention heads side by side
    teacher: [..., tokens, d_t]
    heads:   relation heads that both widths are divided into
    causal:  relations to tokens before and to itself only
    returns: [..., tokens], the mean over the relation heads, float32 or better
    raises: UsageError
    """
    ls, lt = (_relations(states, heads, causal) for states in (student, teacher.detach()))
    terms = lt.exp() * (lt - ls).masked_fill(lt == -torch.inf, 0.0)
    return terms.sum(-1).mean(-2)


def _relations(states: Tensor, heads: int, causal: bool) -> Tensor:
    """Logs of how each token attends to the others, [..., heads, tokens, tokens]."""
    width = states.shape[-1]
    if heads < 1 or width % heads:
        raise UsageError(f"{heads} relation heads: they must divide the width of the states, {width}")
    parts = states.to(working_dtype(states)).unflatten(-1, (heads, width // heads)).transpose(-2, -3)
    scores = parts @ parts.transpose(-1, -2) / (width // heads) ** 0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=states.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.log_softmax(-1)


def _comparable(student: Tensor, teacher: Tensor, projector: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(student)
    ours, theirs = student.to(dtype), teacher.detach().to(dtype)
    if projector is not None:
        ours = ours @ projector.to(dtype).t()
    if ours.shape != theirs.shape:
        raise Mismatch(
            f"the student's hidden states are {list(ours.shape)}, the teacher's {list(theirs.shape)}; "
            "states of another width need a projector"
        )
    return ours, theirs
