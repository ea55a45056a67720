"""How far two checkpoints are apart, tensor by tensor: distance, cosine, largest difference, equal or not.

Both are read tensor by tensor and in pieces that fit the processor's cache, so memory is a few pieces for each
thread, whatever the models' size. Sums are in float64: neither tiny nor huge values are lost in a square. Tensors of
unlike types are compared by value. Where a value is NaN or infinite on either side, the element is left out of the
sums, counted and told. A head that one side ties to its embedding is compared with that embedding.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt

import torch
from torch import Tensor

from wtool.checkpoint import Checkpoint
from wtool.checkpoint.quantized import refuse_quantized
from wtool.checkpoint.tied import embedding_name, head_name, is_tied
from wtool.threads import available_processors, thread_pool

CHUNK = 1 << 16  # elements
LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the first number in a tensor's name is its layer


@dataclass(frozen=True)
class Sums:
    """What one pass over two tensors of one shape gathers; sums of several tensors add up."""

    aa: float = 0.0  # of a², over the elements that are finite in both
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0  # of (a - b)²
    largest: float = 0.0  # |a - b|
    nonfinite: tuple[int, int] = (0, 0)  # NaN and infinite elements of each
    equal: bool = True  # every element has the same value in both; NaN is the same as NaN

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.aa + other.aa,
            self.bb + other.bb,
            self.ab + other.ab,
            self.dd + other.dd,
            max(self.largest, other.largest),
            (self.nonfinite[0] + other.nonfinite[0], self.nonfinite[1] + other.nonfinite[1]),
            self.equal and other.equal,
        )

    @property
    def relative(self) -> float:
        """||a - b|| / ||a||; infinite where only a is zero."""
        if self.dd == 0.0:
            return 0.0
        return sqrt(self.dd) / sqrt(self.aa) if self.aa else inf

    @property
    def cosine(self) -> float | None:
        """Of the angle between a and b as long vectors, in [-1, 1]; None where one of them is zero."""
        if self.aa == 0.0 or self.bb == 0.0:
            return None
        if self.dd == 0.0:
            return 1.0
        return max(-1.0, min(1.0, self.ab / (sqrt(self.aa) * sqrt(self.bb))))


@dataclass(frozen=True)
class Difference:
    """One tensor of a against its counterpart in b."""

    name: str  # in a
    other: str  # in b: another name where a head is tied
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    sums: Sums

    @property
    def badness(self) -> tuple[bool, float, float]:
        """What the worst is found by: values that are not finite on one side only, then distance."""
        return not self.sums.equal and any(self.sums.nonfinite), self.sums.relative, self.sums.largest


@dataclass(frozen=True)
class Comparison:
    """All there is to say of two checkpoints' weights."""

    differences: tuple[Difference, ...]  # the tensors of both, in the order of a
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # tensors that cannot be compared

    @cached_property
    def overall(self) -> Sums:
        return sum((difference.sums for difference in self.differences), Sums())

    @cached_property
    def layers(self) -> dict[int, Sums]:
        """The sums of each layer, by its number."""
        layers: dict[int, Sums] = {}
        for difference in self.differences:
            if match := LAYER.search(difference.name):
                layers[int(match[1])] = layers.get(int(match[1]), Sums()) + difference.sums
        return dict(sorted(layers.items()))

    @property
    def equal(self) -> int:
        """How many tensors have the same values."""
        return sum(difference.sums.equal for difference in self.differences)

    @property
    def identical(self) -> bool:
        """Whether both have the same tensors with the same types, shapes and values."""
        types = all(difference.dtypes[0] == difference.dtypes[1] for difference in self.differences)
        return types and self.overall.equal and not (self.only_a or self.only_b or self.shapes)

    def worst(self, count: int) -> list[Difference]:
        return sorted(self.differences, key=lambda difference: difference.badness, reverse=True)[:count]


@dataclass(frozen=True)
class Pairing:
    """Which tensor of a is compared with which of b, told from headers alone."""

    pairs: tuple[tuple[str, str], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def pair(a: Checkpoint, b: Checkpoint) -> Pairing:
    """Find each tensor's counterpart."""
    head = head_name({**a.tensors, **b.tensors})
    pairs: list[tuple[str, str]] = []
    for name in a.tensors:
        other = _counterpart(name, head, b)
        if other in b.tensors:
            pairs.append((name, other))
    if head is not None and head in b.tensors and head not in a.tensors:
        own = _counterpart(head, head, a)
        if own in a.tensors:
            pairs.append((own, head))
    seen_a, seen_b = {name for name, _ in pairs}, {name for _, name in pairs}
    return Pairing(
        tuple(pairs),
        tuple(name for name in a.tensors if name not in seen_a),
        tuple(name for name in b.tensors if name not in seen_b),
    )


def _counterpart(name: str, head: str | None, checkpoint: Checkpoint) -> str:
    """The name that plays a tensor's part in a checkpoint: for a head it ties and does not hold, the embedding."""
    if name == head and name not in checkpoint.tensors and is_tied(checkpoint.config):
        return embedding_name(checkpoint.tensors) or name
    return name


def compare(
    a: Checkpoint, b: Checkpoint, *, workers: int | None = None, progress: Callable[[int], None] = lambda nbytes: None
) -> Comparison:
    """Compare two checkpoints.

    workers: threads; all processors of the process if None
    progress: is told the bytes of `a` that were compared
    raises: QuantizedInput for packed weights
    """
    refuse_quantized(a)
    refuse_quantized(b)
    pairing = pair(a, b)
    alike = [(name, other) for name, other in pairing.pairs if a.tensors[name].shape == b.tensors[other].shape]
    shapes = [
        (name, a.tensors[name].shape, b.tensors[other].shape)
        for name, other in pairing.pairs
        if a.tensors[name].shape != b.tensors[other].shape
    ]
    threads = workers or available_processors()

    def work(number: int) -> Difference:
        for name, other in alike[number + threads : number + threads + 1]:
            a.prefetch(name)
            b.prefetch(other)
        name, other = alike[number]
        info = a.tensors[name]
        sums = measure(a.read(name), b.read(other))
        a.forget(name)
        b.forget(other)
        progress(info.nbytes)
        return Difference(name, other, info.shape, (info.dtype, b.tensors[other].dtype), sums)

    with thread_pool(threads) as pool:
        try:
            differences = tuple(pool.map(work, range(len(alike))))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Comparison(differences, pairing.only_a, pairing.only_b, tuple(shapes))


def measure(a: Tensor, b: Tensor) -> Sums:
    """Compare two tensors of one shape and of any types."""
    if a.is_complex() or b.is_complex():
        a, b = (torch.view_as_real(tensor.to(torch.complex128)) for tensor in (a, b))
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    total = Sums()
    buffers = [torch.empty(min(CHUNK, flat_a.numel()), dtype=torch.float64) for _ in range(2)]
    for begin in range(0, flat_a.numel(), CHUNK):
        parts = [flat[begin : begin + CHUNK] for flat in (flat_a, flat_b)]
        total += _measure_piece(*(buffer[: len(part)].copy_(part) for buffer, part in zip(buffers, parts, strict=True)))
    integers = a.dtype == b.dtype and not a.is_floating_point()  # beyond 2^53, float64 does not tell all of them apart
    if integers and total.equal and not torch.equal(a, b):
        return Sums(**{**vars(total), "equal": False})
    return total


def _measure_piece(a: Tensor, b: Tensor) -> Sums:
    """Compare two float64 pieces, which are overwritten."""
    aa, bb, ab = a.dot(a).item(), b.dot(b).item(), a.dot(b).item()
    if not (aa < inf and bb < inf):  # NaN or infinity among them
        return _measure_finite(a, b)
    d = b.sub_(a)
    dd, largest = d.dot(d).item(), d.abs_().max().item()
    return Sums(aa, bb, ab, dd, largest, equal=largest == 0.0)


def _measure_finite(a: Tensor, b: Tensor) -> Sums:
    """Compare the elements that are finite in both, and count the others."""
    finite_a, finite_b = a.isfinite(), b.isfinite()
    finite = finite_a & finite_b
    equal = bool(((a == b) | (a.isnan() & b.isnan())).all())
    nonfinite = (int((~finite_a).sum()), int((~finite_b).sum()))
    if not finite.any():
        return Sums(nonfinite=nonfinite, equal=equal)
    a, b = a[finite], b[finite]
    d = b - a
    sums = (a.dot(a).item(), b.dot(b).item(), a.dot(b).item(), d.dot(d).item(), d.abs().max().item())
    return Sums(*sums, nonfinite, equal)
