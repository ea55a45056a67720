"""Task vectors: what fine-tuning added to a base, thinned out, weighed, made to agree, summed, added back.

The common form of task arithmetic, TIES and DARE. With task vectors d_i = theta_i - theta_0:

    1. thin     d_i <- S_i(d_i)                                  (what TIES and DARE do differently)
    2. weigh    d_i <- w_i d_i
    3. elect    s = +1 where sum_i d_i >= 0, else -1; drop what has another sign than s   (TIES; optional)
    4. sum      d = sum_i d_i, divided, if asked, by the weights of the models that take part in the element
    5. add      out = theta_0 + lambda d
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..methods.linear import linear
from . import chunks

NOTHING = 1e-12  # a factor that weights such as 0.7 + 0.2 + 0.1 leave of 0

Thin = Callable[[int, Tensor, Tensor], None]
"""(first element, piece of a task vector to change in place, spare piece)."""


def merge_task_vectors(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    thin: Sequence[Thin | None],
    weight: Sequence[float],
    elect: bool,
    normalize: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Merge by the five steps above.

    thin:      one a model; None leaves its task vector as it is
    elect:     drop elements whose sign is not the majority's
    normalize: divide each element by the sum of the weights that went into it
    scale:     lambda
    """
    if elect:
        return _merge_elected(base, models, thin, weight, normalize, scale, dtype)
    total = sum(weight) if normalize else 1.0
    factors = [scale * w / (1.0 if abs(total) < 1e-8 else total) for w in weight]
    kind = chunks.result_type([base, *models], dtype)
    if not any(thin) and _is_mean(factors) and _is_short([base, *models], kind):
        return _mean(base, models, factors, kind)

    def merge(begin: int, parts: list[Tensor], spare: list[Tensor]) -> Tensor:
        original, *tuned = parts
        out = spare[0].copy_(original)
        for part, thin_out, factor in zip(tuned, thin, factors, strict=True):
            part.sub_(original)
            if thin_out:
                thin_out(begin, part, spare[1])
            out.add_(part, alpha=factor)
        return out

    return chunks.apply(merge, [base, *models], spare=2, dtype=kind)


def _is_mean(factors: Sequence[float]) -> bool:
    """Whether theta_0 + sum_i f_i d_i is a mean of the base and the models, without a weight below 0."""
    return min(factors) >= 0.0 and sum(factors) <= 1.0 + NOTHING


def _is_short(tensors: Sequence[Tensor], kind: torch.dtype) -> bool:
    """Whether all have one 16-bit type: then float32's rounding is lost in the cast, and models that equal the base
    give the base."""
    return kind in (torch.bfloat16, torch.float16) and all(tensor.dtype == kind for tensor in tensors)


def _mean(base: Tensor, models: Sequence[Tensor], factors: Sequence[float], kind: torch.dtype) -> Tensor:
    """(1 - sum_i f_i) theta_0 + sum_i f_i theta_i; tensors of factor 0 are not read."""
    parts = [(base, 1.0 - sum(factors)), *zip(models, factors, strict=True)]
    read = [(tensor, factor) for tensor, factor in parts if factor > NOTHING]
    return linear([tensor for tensor, _ in read], weight=[factor for _, factor in read], dtype=kind)


def _merge_elected(
    base: Tensor,
    models: Sequence[Tensor],
    thin: Sequence[Thin | None],
    weight: Sequence[float],
    normalize: bool,
    scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    # Arithmetic has no branches: to pick by a boolean tensor takes ten times as long as a product. With s = +1 or -1
    # for the elected sign, s d_i is positive where a model agrees, and its positive part is what it adds.
    if normalize and len(set(weight)) == 1 and weight[0] > 0:
        weight = [1.0] * len(weight)  # the mean of equal weights does not depend on them
    smallest = min(weight)

    def merge(begin: int, parts: list[Tensor], spare: list[Tensor]) -> Tensor:
        original, *tuned = parts
        sign, count, aside = spare
        for part, thin_out, w in zip(tuned, thin, weight, strict=True):
            part.sub_(original)
            if thin_out:
                thin_out(begin, part, aside)
            if w != 1.0:
                part.mul_(w)
        total = sign.copy_(tuned[0])
        for part in tuned[1:]:
            total.add_(part)
        torch.copysign(one, total, out=sign)
        out = tuned[0]
        for i, (part, w) in enumerate(zip(tuned, weight, strict=True)):
            part.mul_(sign).clamp_min_(0.0)
            if normalize:
                takes_part = torch.sign(part, out=aside if i else count)
                if i:
                    count.add_(takes_part, alpha=w)
                elif w != 1.0:
                    count.mul_(w)
            if i:
                out.add_(part)
        if normalize:  # where nobody takes part the sum is 0: divide it by anything
            out.div_(count.clamp_min_(smallest) if smallest > 0 else count.add_(torch.eq(count, 0.0, out=aside)))
        return original.addcmul_(out, sign, value=scale)

    one = torch.ones((), dtype=chunks.working_type([base, *models]))
    return chunks.apply(merge, [base, *models], spare=3, dtype=chunks.result_type([base, *models], dtype))


def length_ratio(base: Tensor, model: Tensor, thin: Thin) -> float:
    """How much the l1 norm of a task vector shrinks by thinning: |d| / |S(d)|; 1 where either is 0."""
    before, after = lengths(base, model, thin)
    return before / after if before and after else 1.0


def lengths(base: Tensor, model: Tensor, thin: Thin) -> tuple[float, float]:
    """The l1 norm of a task vector, and of what thinning leaves of it."""
    before = after = 0.0
    spare = torch.empty(chunks.CHUNK, dtype=chunks.working_type([base, model]))
    ones = torch.ones_like(spare)
    for begin, (original, part) in chunks.pieces([base, model]):
        part.sub_(original)
        size = part.numel()
        before += torch.abs(part, out=spare[:size]).dot(ones[:size]).item()
        thin(begin, part, spare[:size])
        after += part.abs_().dot(ones[:size]).item()
    return before, after


def rescaled(thin: Thin, ratio: float) -> Thin:
    """Thinning followed by a multiplication."""

    def thin_and_scale(begin: int, part: Tensor, spare: Tensor) -> None:
        thin(begin, part, spare)
        part.mul_(ratio)

    return thin_and_scale
