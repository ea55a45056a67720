"""AWQ's scales, then learned rounding: both on the walk that learns.

A block's scales are found from what the model as it was feeds it, after which the block is filled with what they make
of its tensors, and its rounding learned. The first stream of activations has gone through it unscaled by then, so that
a run that was stopped goes on to the same bytes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wtool.block_fit import Lesson
from wtool.block_pass import Site
from wtool.network import Linear, Network
from wtool.rewrite import Output
from wtool.statistics import Gram

from .calibrated import Inputs, Quantizing
from .learned import LearnedRewriting
from .scaled import GramAndSize, ScaledRewriting, Seen


class ScaledLearnedRewriting(LearnedRewriting, ScaledRewriting):
    """The visitor of a walk that scales every block and learns its rounding."""

    def __init__(self, change: Quantizing, network: Network, output: Output, transposed: Collection[str]):
        super().__init__(change, network, output, transposed)
        self._seen: dict[tuple[Linear, ...], Seen] = {}  # of the block being done, by linears that share an input

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> GramAndSize | None:
        return GramAndSize(features, device, lifted=self._lifted) if self._changed(linears) else None

    def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
        assert isinstance(site.gathered, GramAndSize), "as begun above"
        self._seen[tuple(self._changed(site.linears))] = site.gathered.seen()
        return {}

    def fit(self, lesson: Lesson, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        seen, self._seen = self._seen, {}
        by_name = {linear.name: inputs for linears, inputs in seen.items() for linear in linears}
        for chain in self.chains_of(lesson.forward):
            self.scale(chain, by_name)
        self._network.fill(lesson.forward.block, self.scaled_tensor)
        for linears, inputs in seen.items():
            self.begin(linears, self._divided(linears[0], inputs))
        return super().fit(lesson, unseen)

    def _divided(self, linear: Linear, inputs: Seen) -> Inputs:
        """Inputs after the scaling, in the memory of what they were; linears that share an input share its scales."""
        scales = self.columns_of(linear)
        return inputs if scales is None else replace(inputs, gram=inputs.gram.div_(scales).div_(scales[:, None]))
