"""From a tensor that is wanted to the step that makes it: what is read, in which shape, with which numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wtool.checkpoint import Checkpoint, TensorInfo
from wtool.checkpoint.tied import is_tied
from wtool.dtypes import FLOATS, promote, torch_dtype
from wtool.errors import Mismatch, UsageError, did_you_mean
from wtool.pieces import Pieces
from wtool.plan import Step, Told
from wtool.rounding import SHORT, at_random

from .arithmetic.chunks import working_type
from .arithmetic.random_mask import mask_key
from .disagreement import Watch, figures, is_told
from .methods.table import Method, Parameter
from .parameters import resolve
from .roles import Entry, Mix

# Buffers that old versions of transformers saved and new ones compute: not weights, and no loss where one is missing.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
MAX_LISTED = 5  # tensors named one by one in a list of problems


class Vocabulary(Protocol):
    """The output's tokens, where those of the inputs differ: which row of each input stands for each of them.

    Sources are told by their numbers, in the plan's order.
    """

    @property
    def size(self) -> int:
        """Rows of the output's embedding."""
        ...

    @property
    def files(self) -> Mapping[str, bytes | Path]:
        """The output's tokenizer files, in the place of the donor's."""
        ...

    @property
    def problems(self) -> Sequence[str]: ...

    @property
    def warnings(self) -> Sequence[str]: ...

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json, with what it must say of the vocabulary."""
        ...

    def axis(self, name: str, info: TensorInfo) -> int | None:
        """The axis of a tensor that counts tokens; None where there is none.

        info: of the tensor in the first input
        """
        ...

    def shape(self, axis: int, info: TensorInfo) -> TensorInfo:
        """What becomes of such a tensor in the output."""
        ...

    def beside(self, sources: Sequence[int]) -> Sequence[int]:
        """The sources that are to be read beside a step's inputs, for rows that those lack."""
        ...

    def aligned(
        self, function: Callable[..., Pieces | Told], axis: int, sources: Sequence[int], count: int
    ) -> Callable[..., Pieces | Told]:
        """The function of the first `count` tensors, with their rows in the output's order; sources: of each tensor."""
        ...

    def scratch(self, info: TensorInfo, infos: Sequence[TensorInfo], sources: Sequence[int], axis: int) -> int:
        """Bytes that the rows in the output's order take while a step runs.

        info:  of the output
        infos: of the function's inputs; sources: of each
        """
        ...


@dataclass(frozen=True)
class Wanted:
    """A tensor of the output."""

    name: str
    mix: Mix
    names: tuple[str, ...]  # the tensor's, in each input of the mix
    depth: float  # where it stands between the first layer (0) and the last (1)


class Steps:
    """Makes steps, and collects what stands against them."""

    def __init__(
        self,
        sources: Sequence[Checkpoint],
        where: Mapping[str, int],
        *,
        head: str | None,
        embedding: str | None,
        dtype: str | None,
        rounding: str | None,
        seed: int,
        vocabulary: Vocabulary | None,
    ):
        self.sources, self.where = sources, where
        self.head, self.embedding = head, embedding
        self.dtype, self.rounding, self.seed, self.vocabulary = dtype, rounding, seed, vocabulary
        self.tied = [embedding is not None and is_tied(source.config) for source in sources]
        self.absent: list[str] = []
        self.unlike: list[str] = []

    @property
    def problems(self) -> list[str]:
        more = len(self.absent) - MAX_LISTED
        rest = [f"{more} more tensors are missing in some of the models"] if more > 0 else []
        return [*self.unlike, *self.absent[:MAX_LISTED], *rest]

    def step(self, wanted: Wanted) -> Step | None:
        """The step that makes a tensor; None where it cannot be made, or need not be."""
        reads = [
            (source, self._name_in(source, name))
            for source, name in zip(self._numbers_of(wanted.mix.inputs), wanted.names, strict=True)
        ]
        missing = next((pair for pair in reads if pair[1] not in self.sources[pair[0]].tensors), None)
        if missing:
            if not wanted.name.endswith(COMPUTED):
                self.absent.append(self._absent(wanted, *missing))
            return None
        infos = [self.sources[source].tensors[name] for source, name in reads]
        axis = self.vocabulary.axis(wanted.name, infos[0]) if self.vocabulary else None
        if problem := self._unlike(wanted.name, reads, infos, axis):
            self.unlike.append(problem)
            return None
        if any(info.dtype not in FLOATS for info in infos):
            return Step(tuple(reads), {wanted.name: infos[0]}, partial(_equal, wanted.name))
        return self._made(wanted, reads, infos, axis)

    def _made(
        self, wanted: Wanted, reads: Sequence[tuple[int, str]], infos: Sequence[TensorInfo], axis: int | None
    ) -> Step:
        mix, name = wanted.mix, wanted.name
        info = TensorInfo(self.dtype or promote([info.dtype for info in infos]), infos[0].shape)
        kind = torch_dtype(info.dtype)
        call = partial(_call, mix.row, mix.base is not None, self._arguments(wanted, kind))
        at_random = kind in SHORT and (self.rounding or mix.row.rounding) == "stochastic"
        seed = mask_key(self.seed, 0, name) % 2**63 if at_random else None
        function = partial(_make, call, name if mix.base is not None else None, kind, seed)
        if axis is not None and self.vocabulary is not None:
            return self._aligned(self.vocabulary, name, reads, info, function, axis)
        return Step(tuple(reads), {name: info}, function, in_pieces=True)

    def _aligned(
        self,
        vocabulary: Vocabulary,
        name: str,
        reads: Sequence[tuple[int, str]],
        info: TensorInfo,
        function: Callable[..., Pieces | Told],
        axis: int,
    ) -> Step:
        """The step of a tensor that counts tokens, with the sources that have rows its inputs lack."""
        inputs = [source for source, _ in reads]
        infos = [self.sources[source].tensors[read] for source, read in reads]
        beside = [(source, self._name_in(source, name)) for source in vocabulary.beside(inputs)]
        beside = [(source, read) for source, read in beside if read in self.sources[source].tensors]
        info = vocabulary.shape(axis, info)
        aligned = vocabulary.aligned(function, axis, [*inputs, *(source for source, _ in beside)], len(inputs))
        return Step((*reads, *beside), {name: info}, aligned, vocabulary.scratch(info, infos, inputs, axis), True)

    def _numbers_of(self, entries: Sequence[Entry]) -> list[int]:
        return [self.where[entry.model] for entry in entries]

    def _name_in(self, source: int, name: str) -> str:
        """The tensor that plays a name's part: for a head tied to the embedding, the embedding."""
        if name == self.head and self.tied[source] and self.embedding:
            return self.embedding
        return name

    def _absent(self, wanted: Wanted, source: int, name: str) -> str:
        lacking = self.sources[source]
        having = [
            (self.sources[other].label, own)
            for other, own in zip(self._numbers_of(wanted.mix.inputs), wanted.names, strict=True)
            if own in self.sources[other].tensors
        ] or [(other.label, name) for other in self.sources if name in other.tensors]
        is_in = f"is in {having[0][0]} and not" if having and having[0][1] == name else "is not"
        return f"tensor '{name}' {is_in} in {lacking.label}{did_you_mean(name, lacking.tensors)}"

    def _unlike(
        self, name: str, reads: Sequence[tuple[int, str]], infos: Sequence[TensorInfo], axis: int | None
    ) -> str | None:
        """What is wrong with the shapes; the axis of tokens may be of any length."""
        first = infos[0]
        for (source, _), info in zip(reads, infos, strict=True):
            if _without(info.shape, axis) != _without(first.shape, axis):
                return (
                    f"tensor '{name}' is {list(first.shape)} in {self.sources[reads[0][0]].label} "
                    f"and {list(info.shape)} in {self.sources[source].label}"
                )
        return None

    def _arguments(self, wanted: Wanted, dtype: torch.dtype) -> dict[str, Any]:
        """The method's keyword arguments for one tensor."""
        mix, row = wanted.mix, wanted.mix.row
        arguments: dict[str, Any] = {"dtype": dtype}
        for key, parameter in row.shared.items():
            if parameter.argument != "":
                value = resolve(key, parameter, mix.shared, wanted.name, wanted.depth, "parameters")
                arguments[parameter.argument or key] = value
        names = wanted.names[len(wanted.names) - len(mix.models) :]
        for key, parameter in row.per_model.items():
            arguments[key] = [
                self._own(key, parameter, entry, mix, name, wanted.depth)
                for entry, name in zip(mix.models, names, strict=True)
            ]
        if row.is_random:
            arguments["key"] = [mask_key(self.seed, i, wanted.name) for i in range(len(mix.models))]
        total = sum(arguments.get("weight", [1.0]))
        if arguments.get("normalize") and mix.base is None and total == 0:
            raise UsageError(
                f"the weights of tensor '{wanted.name}' sum to 0, and a mean divides by it; normalize: false adds up"
            )
        return arguments

    def _own(self, key: str, parameter: Parameter, entry: Entry, mix: Mix, name: str, depth: float) -> Any:
        """A model's parameter for one tensor."""
        whose = self.sources[self.where[entry.model]].label
        return resolve(key, parameter, [entry.parameters, *mix.shared], name, depth, whose)


def _without(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
    return tuple(size for number, size in enumerate(shape) if number != axis)


def _call(method: Method, based: bool, arguments: Mapping[str, Any], *tensors: Tensor) -> Pieces:
    function = method.function.pieces
    if method.may_have_base:
        return function(tensors[0] if based else None, tensors[1:] if based else tensors, **arguments)
    if method.has_base:
        return function(tensors[0], tensors[1:], **arguments)
    return function(tensors, **arguments)


def _make(
    call: Callable[..., Pieces], name: str | None, dtype: torch.dtype, seed: int | None, *tensors: Tensor
) -> Pieces | Told:
    """Make a tensor by a method, with figures for the report where there is a base.

    name: of the tensor; None without a base
    seed: for rounding at random; None where it is to the nearest
    """
    exact = call(*tensors)
    made = exact if seed is None else at_random(exact, dtype, seed)
    if name is None or not is_told(tensors[0]):
        return made
    watch = Watch(made, exact, working_type(tensors))
    return Told((watch.pieces(),), partial(_figures, name.removesuffix(".weight"), tensors, watch))


def _figures(name: str, tensors: Sequence[Tensor], watch: Watch) -> dict[str, Any]:
    told = figures(tensors[0], tensors[1:], watch)
    return {name: told} if told else {}


def _equal(name: str, *tensors: Tensor) -> Tensor:
    """What is not a float (a mask, a counter) is not merged: it must be the same everywhere."""
    if any(not torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        raise Mismatch(f"tensor '{name}' is {tensors[0].dtype}, which is not merged, and differs between the models")
    return tensors[0].contiguous()
