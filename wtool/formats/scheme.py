"""What formats have in common: the scheme that a linear layer is stored by, and what a format can do."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from wtool.dtypes import TensorInfo
from wtool.grid import Grid, Quantized

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int]  # of a weight: outputs, inputs

EXPERTS = re.compile(r"^(.*\.experts)\.\d+\.")  # the part of a layer's name that all experts of its block share


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is stored."""

    grid: Grid
    ordered: bool = False  # the inputs of a group are no neighbours: GPTQ grouped them by their activations

    def __str__(self) -> str:
        groups = "whole rows" if self.grid.group_size == -1 else f"groups of {self.grid.group_size}"
        kind = "symmetric" if self.grid.symmetric else "asymmetric"
        return f"{self.grid.bits} bits, {groups}, {kind}{', ordered by activation' if self.ordered else ''}"


class Format(ABC):
    """A way to lie on disk. A tensor `P.suffix` belongs to the linear layer P; dicts here go by suffix."""

    packed: ClassVar[str]  # the suffix of the codes, which no plain layer has
    scales: ClassVar[str]  # the suffix of the scales, which have two dimensions as the codes have
    suffixes: ClassVar[tuple[str, ...]]  # of all tensors in the place of `P.weight`
    optional: ClassVar[tuple[str, ...]] = ()  # of those that some files lack
    integers: ClassVar[tuple[str, ...]] = ()  # of those that may be of any integer type
    mixed: ClassVar[bool] = True  # a checkpoint may have layers of several schemes

    # Writing

    @abstractmethod
    def unfit(self, shape: Shape, scheme: Scheme) -> str | None:
        """Tell in a clause why a weight cannot be stored so, and what could be; None where it can."""

    @abstractmethod
    def scale_dtype(self, dtype: str) -> str:
        """The type of the scales, for a model of a type."""

    @abstractmethod
    def layout(self, shape: Shape, scheme: Scheme, scale_dtype: str) -> dict[str, TensorInfo]:
        """The tensors that a weight becomes."""

    @abstractmethod
    def encode(self, quantized: Quantized, scheme: Scheme) -> "dict[str, torch.Tensor]":
        """The same with their data; the scales must have the stored type already."""

    @abstractmethod
    def settings(self, schemes: Mapping[str, Scheme], plain: Collection[str]) -> dict[str, Any]:
        """config.json's `quantization_config`.

        schemes: of every layer that is stored so
        plain: the linear layers that are not, the output head among them even where it is the embedding again
        """

    def files(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Other JSON files that runtimes look for, by name."""
        return {}

    # Reading

    @abstractmethod
    def schemes(self, settings: Mapping[str, Any]) -> Callable[[str], Scheme]:
        """The scheme of a layer by its name, from `quantization_config`.

        raises: with a clause each, QuantizedInput for a variety of the format that is not read here, ValueError for
        settings that make no sense and, when it is called, for a layer that they do not cover
        """

    @abstractmethod
    def shape(
        self, infos: Mapping[str, TensorInfo], scheme: Scheme, read: "Callable[[str], torch.Tensor | None]"
    ) -> Shape:
        """The shape of a weight from its tensors' headers, of which those of codes and scales are there.

        read: a tensor by suffix, for what headers do not tell; None where there is no data
        """

    @abstractmethod
    def decode(self, tensors: "Mapping[str, torch.Tensor]", scheme: Scheme, shape: Shape) -> Quantized:
        """Undo `encode`, for tensors that have the layout.

        raises: ValueError, with a clause, where the data contradicts itself
        """


def entry(settings: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A value of a JSON object.

    raises: ValueError where it is of another kind, or missing without a default
    """
    value = settings.get(key)
    value = default if value is None else value
    if type(value) is not kind:
        raise ValueError(f"'{key}' is {value!r}, not {'a list' if kind is list else f'of type {kind.__name__}'}")
    return value


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression of somebody's settings.

    raises: ValueError where it is none
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"'{text}' is no pattern: {error}") from None
