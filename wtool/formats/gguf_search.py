"""The scales of GGUF's blocks, searched: a few dozen ranges tried for each group, each refitted by least squares.

A group of values x is stored as codes q, x ~ s q, or x ~ s q + m. Rounding for a scale and the best scale for given
codes are both easy, the two at once are not; so scales around the one that covers the range are tried, each gives
codes, each code vector its least-squares scale, and the smallest sum of w (x - s q - m)^2 counts. This is the idea
of llama.cpp's make_qx_quants and make_qkx3_quants
(https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c); here it is written for all groups at once.
"""

import torch
from torch import Tensor

# How far beyond the end of the codes the largest value of a group is put, in codes: above 0 it is clipped
BEYOND = torch.linspace(-1.2, 1.8, 16).tolist()
FINE = 15  # codes of one sign, from which on it does not matter to which end the largest value goes
REFITS = 2  # rounds of codes from the scale, scale from the codes


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))


def quotient(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where there is nothing below."""
    return above * inverse(below)


def symmetric(x: Tensor, weights: Tensor, low: int, high: int) -> Tensor:
    """The scales of groups that are stored as s q.

    x:       [..., n], a group each
    weights: how much each error counts, >= 0; broadcasts to x
    low:     the smallest code, <= 0; high: the largest
    returns: [..., 1], of either sign
    """
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(peak)
    scale = torch.zeros_like(peak)
    ends = [end for end in (low, high) if end][: 2 if high < FINE else 1]
    for end in (end + beyond * (1 if end > 0 else -1) for end in ends for beyond in BEYOND):
        codes = (x * quotient(torch.full_like(peak, end), peak)).round_().clamp_(low, high)
        fitted, gain = _fit(x, weights, codes)
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    for _ in range(REFITS):
        scale = _fit(x, weights, (x * inverse(scale)).round_().clamp_(low, high))[0]
    return scale


def _fit(x: Tensor, weights: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scale of given codes, and by how much it makes the sum of w x^2 smaller; [..., 1] each."""
    weighted = weights * codes
    along, square = (weighted * x).sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
    scale = quotient(along, square)
    return scale, scale * along


def affine(x: Tensor, weights: Tensor, high: int, *, floor: bool) -> tuple[Tensor, Tensor]:
    """The scales and minima of groups that are stored as s q + m, with codes from 0 to high.

    x:       [..., n], a group each
    weights: how much each error counts, >= 0; broadcasts to x
    floor:   whether no minimum may be above 0
    returns: scales >= 0 and minima, [..., 1] each
    """
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least = least.clamp(max=0) if floor else least
    scale, minimum = (most - least) / high, least
    best = _error(x, weights, scale, minimum, _codes(x, scale, minimum, high))
    for beyond in BEYOND:
        tried = (most - least) / (high + beyond)
        codes = _codes(x, tried, least, high)
        fitted = _fit_affine(x, weights, codes, floor)
        error = _error(x, weights, *fitted, codes)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, fitted[0], scale), torch.where(better, fitted[1], minimum)
    for _ in range(REFITS):
        codes = _codes(x, scale, minimum, high)
        fitted = _fit_affine(x, weights, codes, floor)
        better = _error(x, weights, *fitted, codes) <= _error(x, weights, scale, minimum, codes)
        scale, minimum = torch.where(better, fitted[0], scale), torch.where(better, fitted[1], minimum)
    return scale, minimum


def _codes(x: Tensor, scale: Tensor, minimum: Tensor, high: int) -> Tensor:
    return ((x - minimum) * inverse(scale)).round_().clamp_(0, high)


def _error(x: Tensor, weights: Tensor, scale: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
    """The sums of w (x - s q - m)^2, [..., 1]."""
    return (weights * (x - scale * codes - minimum).square_()).sum(-1, keepdim=True)


def _fit_affine(x: Tensor, weights: Tensor, codes: Tensor, floor: bool) -> tuple[Tensor, Tensor]:
    """The least-squares scale and minimum of given codes; where the codes are all equal, the scale is 0."""
    weights = weights.expand_as(x)
    weighted = weights * codes
    total = weights.sum(-1, keepdim=True)
    one, two = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
    plain, along = (weights * x).sum(-1, keepdim=True), (weighted * x).sum(-1, keepdim=True)
    spread = total * two - one * one
    scale = quotient(total * along - plain * one, spread).clamp(min=0)
    minimum = quotient(plain - scale * one, total)
    if not floor:
        return scale, minimum
    above = minimum > 0
    return torch.where(above, quotient(along, two).clamp(min=0), scale), minimum.clamp(max=0)
