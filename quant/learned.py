"""Learned rounding on the walk: the rounding of a block's linears is learned together.

The Gram matrices are of the activations of the model as it was. A matrix that few tokens came to is rounded and not
learned, and one that the block's output never depended on stays at the nearest codes. The report tells.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from wtool.block_fit import Lesson
from wtool.block_pass import Site
from wtool.network import Block, Linear, Network
from wtool.rewrite import Made, Output, Rewriting
from wtool.statistics import Gram

from .calibrated import Found, Inputs, Quantizing, inputs_of, made_of
from .recipe import QuantRecipe
from .signround import Rounding, Schedule, learn

FASTEST = 0.05  # rate that is taken unasked: a few large steps would ruin the scales, whose factors they move too


class LearnedRewriting(Rewriting[Gram]):
    """The visitor of a walk that learns the rounding of every block."""

    def __init__(self, change: Quantizing, network: Network, output: Output, transposed: Collection[str]):
        super().__init__(change, network, output, transposed)
        self._quantizing = change
        self._found: dict[Linear, Found] = {}  # of the block being done
        self._made: dict[Linear, Made] = {}  # of the same

    def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
        self.begin(self._changed(site.linears), inputs_of(site.gathered))
        return {}

    def begin(self, linears: Sequence[Linear], inputs: Inputs) -> None:
        """Find what learning begins with, for linears that share an input."""
        weights = [self._network.view(linear) for linear in linears]
        found = self._quantizing.found([linear.name for linear in linears], weights, inputs)
        self._found |= dict(zip(linears, found, strict=True))

    def fit(self, lesson: Lesson, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        found, self._found = self._found, {}
        rounded = {linear: made_of(one) for linear, one in found.items() if one.outcome.fallback}
        for linear, made in rounded.items():
            lesson.view(linear).copy_(made.value)
        self._made = rounded | self._learned(lesson, {key: one for key, one in found.items() if key not in rounded})
        values = {linear: made.value for linear, made in self._made.items()}
        return {**values, **self.block(lesson.forward.block, unseen)}

    def fitted(self, block: Block, loss: float) -> None:
        told = {"block_loss": float(f"{loss:.6g}")}
        for linear, made in self._made.items():
            self._keep(linear.name, _telling(made, told))
        self._write_beside([linear.name for linear in self._made])
        self._made = {}

    def _learned(self, lesson: Lesson, found: Mapping[Linear, Found]) -> dict[Linear, Made]:
        recipe = self._quantizing.recipe
        if not found:
            return {}
        matrices = [_begun(lesson.view(linear), one) for linear, one in found.items()]
        task = _Task(lesson, list(found))
        learn(matrices, task, _schedule(recipe, lesson, lesson.forward.block.index))
        made: dict[Linear, Made] = {}
        for (linear, one), matrix in zip(found.items(), matrices, strict=True):
            if linear in task.reached:
                outcome = replace(one.outcome, quantized=matrix.quantized())
                made[linear] = made_of(replace(one, outcome=outcome))
            else:
                made[linear] = _telling(made_of(one), {"not_learned": "no gradient came to it"})
        return made


class _Task:
    """What the matrices of a block are to learn."""

    def __init__(self, lesson: Lesson, linears: Sequence[Linear]):
        self._lesson, self._linears = lesson, linears
        self.reached: set[Linear] = set()  # by a gradient

    @property
    def batches(self) -> int:
        return self._lesson.batches

    def put(self, matrices: Sequence[Rounding]) -> None:
        for linear, matrix in zip(self._linears, matrices, strict=True):
            matrix.values(self._lesson.view(linear))

    def gradients(self, batches: Sequence[int]) -> list[Tensor | None]:
        found = self._lesson.gradients(self._linears, batches)
        self.reached.update(linear for linear, slope in zip(self._linears, found, strict=True) if slope is not None)
        return found


def _begun(weight: Tensor, found: Found) -> Rounding:
    outcome, grid = found.outcome, found.layer.scheme.grid
    return Rounding(weight, outcome.quantized, grid)


def _schedule(recipe: QuantRecipe, lesson: Lesson, block: int) -> Schedule:
    windows = max(len(lesson.targets[number]) for number in range(lesson.batches))
    rate = recipe.lr or min(1 / recipe.iters, FASTEST)
    seed = recipe.calibration.seed * 1_000_003 + block
    return Schedule(recipe.iters, -(-recipe.batch // windows), rate, seed)


def _telling(made: Made, more: Mapping[str, Any]) -> Made:
    """The same, of which the report tells more."""
    explain: Callable[[Tensor], Mapping[str, Any]] = made.explain
    return replace(made, explain=lambda weight: {**explain(weight), **more})
