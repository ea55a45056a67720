"""`wtool` that forgets the mass of the tokens which a cache did not keep, as most peers do: for the comparison alone.

    python without_tail.py distill CACHE STUDENT ...

The loss is then the k terms of the forward KL, and so is the KL by which held-out text is judged.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from distill.signals import TopK
from distill.teacher import CachedTeacher, Said
from wtool.cli import main

whole = CachedTeacher.say


def say(
    self: CachedTeacher,
    inputs: Mapping[str, Tensor],
    learnt: Tensor,
    *,
    all_states: bool = False,
    layer: int | None = None,
) -> Said:
    """What the cache holds, less the tail."""
    said = whole(self, inputs, learnt, all_states=all_states, layer=layer)
    assert isinstance(said.targets, TopK)
    return replace(said, targets=replace(said.targets, tail=None))


if __name__ == "__main__":
    CachedTeacher.say = say
    main()
