"""Depth: which layers to keep.

block influence   1 - mean cosine of a layer's input and output (Men et al., "ShortGPT: Layers in Large Language
                  Models are More Redundant Than You Expect", 2024, https://arxiv.org/abs/2403.03853)
angular           the run of layers over which the last token's state turns least, in angle (Gromov et al., "The
                  Unreasonable Ineffectiveness of the Deeper Layers", 2024, https://arxiv.org/abs/2403.17887, eq. 7)
perplexity        the layer without which the loss rises least is taken out, again and again (Kim et al., "Shortened
                  LLaMA", 2024, https://arxiv.org/abs/2402.02834; with recomputation as Zhong et al., "BlockPruner",
                  2024, https://arxiv.org/abs/2406.10594)
last              the layers before the last one: what the others are to be better than
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import pi

import torch
from torch import Tensor

CANDIDATES = 10  # layers tried in a round after the first: those that seemed least needed in the round before
Losses = Callable[[Sequence[Collection[int]]], Sequence[float]]  # of models that lack some layers each


def by_influence(influences: Mapping[int, float], keep: int) -> tuple[int, ...]:
    """The layers that turn their input most.

    influences: by layer
    """
    order = sorted(influences, key=lambda layer: (-influences[layer], layer))
    return tuple(sorted(order[:keep]))


def by_angle(ends: Sequence[Tensor], keep: int) -> tuple[int, ...]:
    """All layers but the run over which the last tokens turn least.

    ends: [windows, hidden] before layer 0, 1, … and after the last
    """
    depth = len(ends) - 1
    gone = depth - keep
    distances = [_angle(ends[first], ends[first + gone]) for first in range(keep + 1)]
    first = min(range(keep + 1), key=lambda number: distances[number])
    return tuple(layer for layer in range(depth) if not first <= layer < first + gone)


def _angle(before: Tensor, after: Tensor) -> float:
    """The mean angle between states, as a share of a half turn."""
    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return float(cosine.clamp(-1, 1).arccos().mean()) / pi


def by_loss(losses: Losses, depth: int, keep: int) -> tuple[int, ...]:
    """Take out one layer after the other, each time the one without which the loss is lowest.

    losses: of models that lack some layers each; asked once a round
    """
    gone = {layer for layer, _ in removals(losses, depth, depth - keep)}
    return tuple(layer for layer in range(depth) if layer not in gone)


def removals(losses: Losses, depth: int, count: int) -> list[tuple[int, float]]:
    """Layers in the order in which they are best taken out, each with the loss when it and those before are gone."""
    gone: list[tuple[int, float]] = []
    order = list(range(depth))
    for taken in range(count):
        lacks = frozenset(layer for layer, _ in gone)
        tried = order[: CANDIDATES if taken else None]
        found = dict(zip(tried, losses([lacks | {layer} for layer in tried]), strict=True))
        best = min(tried, key=lambda layer: (found[layer], layer))
        gone.append((best, found[best]))
        # those not tried seemed worse the last time they were
        order = sorted(tried, key=lambda layer: (found[layer], layer))[1:] + order[len(tried) :]
    return gone


def before_last(depth: int, keep: int) -> tuple[int, ...]:
    """All layers but the ones before the last."""
    return (*range(keep - 1), depth - 1) if keep else ()
