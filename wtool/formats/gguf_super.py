"""The super-blocks of GGUF's K types: 256 values in groups, whose scales are integers times one number of 16 bits.

    x ~ d a q            Q3_K, Q6_K: a of either sign, codes q around 0
    x ~ d a q - e b      Q2_K, Q4_K, Q5_K: a and b >= 0, codes q from 0 up

a (and b) belong to a group, d (and e) to the super-block. Format: k-quants of llama.cpp, Kawrakow 2023
(https://github.com/ggml-org/llama.cpp/pull/1684). The groups are fitted first (`gguf_search`), then their scales are
rounded; then, in turns, each group tries the integers next to its own, and d and e are fitted to all codes by least
squares. Only what makes the sum of w (x - decoded)^2 smaller is kept.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from wtool.formats.gguf_search import affine, inverse, quotient, symmetric

SIZE = 256  # values in a super-block
ROUNDS = 2


@dataclass(frozen=True)
class Kind:
    """What a super-block has in it."""

    group: int  # values
    low: int  # of the codes
    high: int
    scale_low: int  # of the groups' scales
    scale_high: int  # and of their minima
    minima: bool


@dataclass(frozen=True)
class Super:
    """Super-blocks, encoded."""

    codes: Tensor  # [blocks, groups, group], whole numbers in float32
    scales: Tensor  # [blocks, groups, 1], the same
    minima: Tensor  # [blocks, groups, 1], the same; zeros in a kind that has none
    d: Tensor  # [blocks, 1, 1], float32 that float16 holds
    e: Tensor  # [blocks, 1, 1]

    def values(self) -> Tensor:
        """[blocks, 256], as a reader decodes them."""
        return (self.d * self.scales * self.codes - self.e * self.minima).flatten(1)


def fit(x: Tensor, weights: Tensor, kind: Kind) -> Super:
    """Encode super-blocks.

    x:       [blocks, 256], float32
    weights: how much each error counts, >= 0; [blocks or 1, 256]
    """
    x = x.view(len(x), -1, kind.group)
    weights = weights.view(len(weights), -1, kind.group).expand_as(x)
    made = _start(x, weights, kind)
    for _ in range(ROUNDS):
        made = _refit(x, weights, _neighbours(x, weights, made, kind), kind)
    return made


def _start(x: Tensor, weights: Tensor, kind: Kind) -> Super:
    """Scales fitted group by group, then rounded; an error in a scale counts as it does in the group's values."""
    if kind.minima:
        scale, minimum = affine(x, weights, kind.high, floor=True)
        depth = -minimum
        e, minima = _rounded(depth, weights.sum(-1, keepdim=True), 0, kind.scale_high)
    else:
        scale = symmetric(x, weights, kind.low, kind.high)
        depth = torch.zeros_like(scale)
        e, minima = depth[:, :1], depth
    codes = _codes(x, scale, depth, kind)
    d, scales = _rounded(scale, (weights * codes.square()).sum(-1, keepdim=True), kind.scale_low, kind.scale_high)
    return Super(_codes(x, d * scales, e * minima, kind), scales, minima, d, e)


def _rounded(values: Tensor, weights: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The groups' scales [blocks, groups, 1] as one number of 16 bits a block times whole numbers."""
    d = half(symmetric(values.transpose(1, 2), weights.transpose(1, 2), low, high))
    return d, (values * inverse(d)).round_().clamp_(low, high)


def half(values: Tensor) -> Tensor:
    """What float16 holds of values, within its range."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).to(torch.float16).float()


def _codes(x: Tensor, scale: Tensor, depth: Tensor, kind: Kind) -> Tensor:
    return ((x + depth) * inverse(scale)).round_().clamp_(kind.low, kind.high)


def _errors(x: Tensor, weights: Tensor, made: Super) -> Tensor:
    """[blocks, groups, 1]"""
    decoded = made.d * made.scales * made.codes - made.e * made.minima
    return (weights * (x - decoded).square_()).sum(-1, keepdim=True)


def _neighbours(x: Tensor, weights: Tensor, made: Super, kind: Kind) -> Super:
    """The best of each group's scale and minimum and the whole numbers next to them."""
    best = _errors(x, weights, made)
    codes, scales, minima = made.codes, made.scales, made.minima
    for up, deeper in product((-1, 0, 1), (-1, 0, 1) if kind.minima else (0,)):
        scale = (made.scales + up).clamp(kind.scale_low, kind.scale_high)
        minimum = (made.minima + deeper).clamp(0, kind.scale_high) if kind.minima else made.minima
        found = _codes(x, made.d * scale, made.e * minimum, kind)
        error = _errors(x, weights, Super(found, scale, minimum, made.d, made.e))
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better, found, codes)
        scales, minima = torch.where(better, scale, scales), torch.where(better, minimum, minima)
    return Super(codes, scales, minima, made.d, made.e)


def _refit(x: Tensor, weights: Tensor, made: Super, kind: Kind) -> Super:
    """d and e by least squares over the whole super-block, where they make its error smaller."""
    d, e = _least_squares(x, weights, made)
    codes = _codes(x, d * made.scales, e * made.minima, kind)
    tried = Super(codes, made.scales, made.minima, d, e)
    before, after = (_errors(x, weights, each).sum(1, keepdim=True) for each in (made, tried))
    better = after < before
    return Super(
        torch.where(better, codes, made.codes),
        made.scales,
        made.minima,
        torch.where(better, d, made.d),
        torch.where(better, e, made.e),
    )


def _least_squares(x: Tensor, weights: Tensor, made: Super) -> tuple[Tensor, Tensor]:
    up, down = made.scales * made.codes, made.minima.expand_as(x)
    uu, ud, dd = (_total(weights * left * right) for left, right in ((up, up), (up, down), (down, down)))
    xu, xd = _total(weights * x * up), _total(weights * x * down)
    spread = uu * dd - ud * ud
    e = quotient(xu * ud - xd * uu, spread).clamp(min=0)
    return half(quotient(xu + e * ud, uu)), half(e)


def _total(values: Tensor) -> Tensor:
    """[blocks, 1, 1]"""
    return values.sum((1, 2), keepdim=True)
