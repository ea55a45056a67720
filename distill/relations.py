"""How the tokens of a text relate to one another in a layer's attention: the student's against the teacher's.

Wang, Bao, Huang, Dong and Wei, "MiniLMv2", 2020, https://arxiv.org/abs/2012.15828 (section 3): queries, keys and values
each with themselves, of one layer, the student's last. They are what the projections give, before positions are turned
into them. The relations are those of a causal model: to tokens before and to itself.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from wtool.errors import UsageError

from .hidden_states import relation_divergence

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def layer_pair(ours: int, theirs: int, kept: Sequence[int] | None) -> tuple[int, int]:
    """The student's last layer, and the teacher's that it is compared with: the one it was made of, else the last.

    kept: the teacher's layers that the student was made of
    """
    return ours - 1, theirs - 1 if kept is None else kept[-1]


def projections(model: nn.Module, layer: int) -> dict[str, nn.Module]:
    """What makes the queries, keys and values of a layer.

    raises: UsageError where the model has no such three
    """
    wanted = re.compile(rf"(?:^|\.)layers\.{layer}\.(?:\w+\.)*({'|'.join(PROJECTIONS)})$")
    found = {match[1]: module for name, module in model.named_modules() if (match := wanted.search(name))}
    if found.keys() != set(PROJECTIONS):
        raise UsageError(
            f"relations: layer {layer} of a {type(model).__name__} has no {', '.join(PROJECTIONS)} of its own; "
            "leave --relations out"
        )
    return found


@contextmanager
def projected(model: nn.Module, layer: int | None) -> Iterator[dict[str, Tensor]]:
    """What the projections of a layer, where one is named, give while the model runs: [windows, tokens, width] each."""
    given: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        given[name] = output

    found = {} if layer is None else projections(model, layer)
    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in found.items()]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def relations_apart(ours: dict[str, Tensor], theirs: dict[str, Tensor], learnt: Tensor, heads: int) -> Tensor:
    """The sum over tokens of the mean of the divergences of queries, keys and values.

    ours, theirs: what `projected` gathered
    learnt: bool [windows, tokens]
    heads: the most relation heads; of each of the three there are as many as divide both widths
    """
    total = torch.zeros((), device=learnt.device)
    for name in PROJECTIONS:
        count = relation_heads(ours[name].shape[-1], theirs[name].shape[-1], heads)
        for ours_here, theirs_here, here in zip(ours[name], theirs[name], learnt, strict=True):  # a window at a time
            if here.any():
                found = relation_divergence(ours_here, theirs_here, heads=count, causal=True)
                total = total + found[here].sum()
    return total / len(PROJECTIONS)


def relation_heads(ours: int, theirs: int, most: int) -> int:
    """The largest number, at most `most`, that divides both widths."""
    common = gcd(ours, theirs)
    return max(count for count in range(1, most + 1) if common % count == 0)
