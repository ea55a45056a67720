"""A model with its residual stream turned, read from the one as it is; turning is exact but for one rounding."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint.base import Checkpoint, View
from wtool.checkpoint.tied import head_name, is_tied
from wtool.errors import UsageError
from wtool.linear_names import LAYER
from wtool.plan import Step, Told
from wtool.writer import checksum

from .cut import check_extents
from .families import Family, family_of
from .rotate import turned
from .structure import axes_of, place_of, shape_of

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
TURNING = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3")
_MEAN = "its norms take out the mean over channels, which is another one in other directions"
_OUTPUT = "it has norms over what its blocks put out, whose weights cannot go into a matrix that reads them"
_WHY_NOT = {"gpt2": _MEAN, "bert": _MEAN, "gemma3": _OUTPUT, "gemma3_text": _OUTPUT, "olmo2": _OUTPUT}


class Rotated(View):
    """A view of a checkpoint as the same model with another basis of its residual stream.

    The weights of norms are in the matrices that read them, and 1. A head that was tied to the embedding has a tensor
    of its own, as the final norm's weight is in the one and not in the other.

    directions: as `principal_directions` gives them; None where only headers are needed
    raises: UsageError for a family that cannot be turned, Mismatch if tensors and config.json disagree, QuantizedInput
    """

    def __init__(self, source: Checkpoint, directions: Tensor | None):
        self._family = family_of(source.config)
        _check(source, self._family)
        super().__init__(source)
        self._directions = directions
        tied = is_tied(source.config) and all("CausalLM" in kind for kind in source.config.get("architectures") or ())
        self.config = source.config | ({"tie_word_embeddings": False} if tied else {})
        self._embedding = _embedding(source) if tied and head_name(source.tensors) is None else None
        head = {} if self._embedding is None else {HEAD: source.tensors[self._embedding]}
        self.tensors = {**source.tensors, **head}
        self._origins = {name: self._made_of(name) for name in self.tensors}

    @property
    def digest(self) -> str | None:
        """Tells these directions from others."""
        return None if self._directions is None else checksum(self._directions.contiguous())

    def warnings(self, steps: Sequence[Step]) -> list[str]:
        """What the user should know of steps that read this view."""
        added = sum(info.elements for step in steps for name, info in step.outputs.items() if name == HEAD)
        if self._embedding is None or not added:
            return []
        return [
            f"{self.label}: the head is tied to the embedding, and in other directions it differs: a tensor of its own "
            f"adds {added:,} parameters"
        ]

    def steps(self, steps: Sequence[Step]) -> list[Step]:
        """Steps that read this view as source 0, made to read its source instead."""
        return [self._step(step) for step in steps]

    def _step(self, step: Step) -> Step:
        ((_, name),) = step.reads
        reads = tuple((0, origin) for origin in self._origins[name])
        assert step.function is not None
        return Step(reads, step.outputs, partial(_then, first=partial(self._made, name), second=step.function))

    def read(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise self.missing(name)
        return self._embedded if name.endswith(EMBEDDING) else self._read(name)

    def _read(self, name: str) -> Tensor:
        return self._made(name, *(self.source.read(origin) for origin in self._origins[name]))

    @cached_property
    def _embedded(self) -> Tensor:
        """The embedding, held: a walk reads it for every batch, for some rows, and turning it takes long."""
        return self._read(_embedding(self.source))

    def _made(self, name: str, stored: Tensor, gain: Tensor | None = None) -> Tensor:
        """A tensor from what it is made of."""
        axes = axes_of(self._family, name)
        if "hidden" not in axes:
            return stored
        if _is_norm(axes, name):
            return torch.ones_like(stored)
        assert self._directions is not None, "only headers were asked for"
        return turned(stored, self._directions, axis=axes.index("hidden"), gain=gain)

    def _made_of(self, name: str) -> tuple[str, ...]:
        """The source's tensors that one is made of: itself, and the norm that it reads the stream through."""
        own = self._embedding if self._embedding and name == HEAD else name
        axes = axes_of(self._family, name)
        if len(axes) < 2 or axes[-1] != "hidden" or name.endswith(EMBEDDING):
            return (own,)
        norm = self._norm_before(name)
        if norm not in self.source.tensors:
            raise self.source.missing(norm)
        return own, norm

    def _norm_before(self, name: str) -> str:
        if layer := LAYER.match(name):
            norm = "input_layernorm" if ".self_attn." in name else "post_attention_layernorm"
            return f"{name[: layer.end()]}{norm}.weight"
        outside = (other for other in self.source.tensors if place_of(other)[0] < 0)
        return next((other for other in outside if other.endswith("norm.weight")), "model.norm.weight")

    def parts(self, name: str) -> tuple[str, ...]:
        return self._origins[name]


def _then(*tensors: Tensor, first: Callable[..., Tensor], second: Callable[..., Any]) -> Tensor | Told:
    return second(first(*tensors))


def _is_norm(axes: tuple[str, ...], name: str) -> bool:
    return axes == ("hidden",) and not name.endswith(".bias")


def _check(source: Checkpoint, family: Family) -> None:
    """Refuse what cannot be turned."""
    kind = source.config.get("model_type")
    if kind not in TURNING:
        raise UsageError(
            f"{source.label}: a {kind} cannot be rotated: {_WHY_NOT.get(str(kind), 'its norms are not known here')}"
            f"; those that can: {', '.join(TURNING)}"
        )
    shape = shape_of(source.config)
    for name in source.tensors:
        check_extents(source, family, name, shape)


def _embedding(source: Checkpoint) -> str:
    for name in source.tensors:
        if name.endswith(EMBEDDING):
            return name
    raise source.missing(f"model.{EMBEDDING}")
