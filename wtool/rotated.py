"""A model in another basis, read from the one as it is; it computes the same but for one rounding.

A norm over root mean squares sees a token's length and passes on its direction, and both are known in any orthonormal
basis. So with the norms' own weights moved into the matrices that read them, a model computes the same when its
residual stream x is x Q: what writes to the stream is multiplied by Q on that side, what reads it by Qᵀ, and the two
meet as Q Qᵀ = 1 (SliceGPT, https://arxiv.org/abs/2401.15024, theorem 1; R1 of SpinQuant,
https://arxiv.org/abs/2405.16406). Attention mixes the values of tokens and not their channels, so each head's values
can be turned too, if the output projection turns them back (R2 there). The weights of norms become 1. A head that was
tied to the embedding gets a tensor of its own, as the final norm's weight is in the one and not in the other.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint.base import Checkpoint, View
from wtool.checkpoint.tied import head_name, is_tied
from wtool.dtypes import FLOATS
from wtool.errors import Mismatch, QuantizedInput, UsageError
from wtool.linear_names import LAYER
from wtool.plan import Step, Told
from wtool.rotation import Turn, turned

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
TURNING = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3")
_MEAN = "its norms take out the mean over channels, which is another one in other directions"
_OUTPUT = "it has norms over what its blocks put out, whose weights cannot go into a matrix that reads them"
_WHY_NOT = {"gpt2": _MEAN, "bert": _MEAN, "gemma3": _OUTPUT, "gemma3_text": _OUTPUT, "olmo2": _OUTPUT}
# Modules of these families by what they have to do with the residual stream; biases of what reads it are left alone.
_READING = frozenset("q_proj k_proj v_proj qkv_proj gate_proj up_proj gate_up_proj gate w1 w3 lm_head score".split())
_WRITING = frozenset({"o_proj", "down_proj", "w2"})
_NORMS = frozenset({"input_layernorm", "post_attention_layernorm", "norm"})
_APART = frozenset({"q_norm", "k_norm", "inv_freq"})
_VALUES = frozenset({"v_proj", "qkv_proj"})
HEAD_DIMS = {"qwen3": 128, "qwen3_moe": 128}  # where config.json does not tell, and it is not hidden / heads


class Rotated(View):
    """A view of a checkpoint as the same model in another basis.

    stream: turns the channels of the residual stream; None where only headers are needed
    values: turns the channels of each head's values; None leaves them
    raises: UsageError for a family that cannot be turned, Mismatch if tensors and config.json disagree, QuantizedInput
    """

    def __init__(self, source: Checkpoint, stream: Turn | None, values: Turn | None = None):
        check_family(source)
        super().__init__(source)
        self._stream, self._values = stream, values
        for name in source.tensors:
            self._check(name)
        tied = is_tied(source.config) and all("CausalLM" in kind for kind in source.config.get("architectures") or ())
        self.config = source.config | ({"tie_word_embeddings": False} if tied else {})
        self._embedding = _embedding(source) if tied and head_name(source.tensors) is None else None
        head = {} if self._embedding is None else {HEAD: source.tensors[self._embedding]}
        self.tensors = {**source.tensors, **head}
        self._origins = {name: self._made_of(name) for name in self.tensors}

    @property
    def digest(self) -> str | None:
        """Tells this basis from others."""
        if self._stream is None:
            return None
        return self._stream.digest + (self._values.digest if self._values else "")

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

    def forget(self, name: str) -> None:
        if name.endswith(EMBEDDING) and "_embedded" in self.__dict__:
            del self._embedded
        super().forget(name)

    def _read(self, name: str) -> Tensor:
        return self._made(name, *(self.source.read(origin) for origin in self._origins[name]))

    @cached_property
    def _embedded(self) -> Tensor:
        """The embedding, held: a walk reads it for every batch, for some rows, and turning it takes long."""
        return self._read(_embedding(self.source))

    def _made(self, name: str, stored: Tensor, gain: Tensor | None = None) -> Tensor:
        """A tensor from what it is made of."""
        module = _module(name)
        if module in _NORMS:
            return torch.ones_like(stored)
        axis = _stream_axis(name)
        by_heads = self._values is not None and (module in _VALUES or name.endswith("o_proj.weight"))
        made = stored
        if axis is not None:
            assert self._stream is not None, "only headers were asked for"
            between = torch.promote_types(stored.dtype, torch.float32) if by_heads else None
            made = turned(stored, self._stream, axis=axis, gain=gain, dtype=between)
        return self._with_values(module, made).to(stored.dtype) if by_heads else made

    def _with_values(self, module: str, weight: Tensor) -> Tensor:
        """A weight or bias with each head's values turned: rows of what makes them, columns of what reads them."""
        if module == "o_proj":
            return self._heads_turned(weight, 1)
        if module == "v_proj":
            return self._heads_turned(weight, 0)
        others = len(weight) - self._value_rows(len(weight))
        return torch.cat([weight[:others], self._heads_turned(weight[others:], 0)])

    def _heads_turned(self, weight: Tensor, axis: int) -> Tensor:
        assert self._values is not None
        heads = weight.unflatten(axis, (-1, self.head_dim))
        return turned(heads, self._values, axis=axis + 1).flatten(axis, axis + 1)

    @property
    def head_dim(self) -> int:
        config = self.source.config
        told = config.get("head_dim") or HEAD_DIMS.get(config["model_type"])
        return told or config["hidden_size"] // config["num_attention_heads"]

    def _value_rows(self, rows: int) -> int:
        """How many of the rows of a fused projection make values: as many as make keys, after those of queries."""
        return (rows - self.source.config["num_attention_heads"] * self.head_dim) // 2

    def _check(self, name: str) -> None:
        """Refuse a tensor that is not what config.json says."""
        source, info, module = self.source, self.source.tensors[name], _module(name)
        if module not in _READING | _WRITING | _NORMS | _APART | {"embed_tokens"}:
            kind = source.config["model_type"]
            raise Mismatch(f"{source.label}: tensor '{name}' is not known of a {kind}, so it cannot be rotated")
        if (axis := 0 if module in _NORMS else _stream_axis(name)) is None:
            return
        if info.dtype not in FLOATS:
            raise QuantizedInput(
                f"{source.label}: tensor '{name}' is packed ({info.dtype}): give the unquantized model"
            )
        wanted: list[int | None] = [None] * (1 if module in _NORMS or name.endswith(".bias") else 2)
        wanted[axis] = source.config["hidden_size"]
        if len(info.shape) != len(wanted) or info.shape[axis] != wanted[axis]:
            told = " x ".join("any" if size is None else str(size) for size in wanted)
            raise Mismatch(f"{source.label}: tensor '{name}' is {list(info.shape)}, by config.json it would be {told}")
        self._check_heads(name, info.shape)

    def _check_heads(self, name: str, shape: Sequence[int]) -> None:
        module = _module(name)
        count = {"o_proj": shape[-1], "v_proj": shape[0], "qkv_proj": self._value_rows(shape[0])}.get(module, 0)
        if len(shape) == 2 and count % self.head_dim:
            raise Mismatch(f"{self.source.label}: tensor '{name}' is {list(shape)}, not of heads of {self.head_dim}")

    def _made_of(self, name: str) -> tuple[str, ...]:
        """The source's tensors that one is made of: itself, and the norm that it reads the stream through."""
        own = self._embedding if self._embedding and name == HEAD else name
        if _module(name) not in _READING or name.endswith(".bias"):
            return (own,)
        norm = self._norm_before(name)
        if norm not in self.source.tensors:
            raise self.source.missing(norm)
        return own, norm

    def _norm_before(self, name: str) -> str:
        if layer := LAYER.match(name):
            norm = "input_layernorm" if ".self_attn." in name else "post_attention_layernorm"
            return f"{name[: layer.end()]}{norm}.weight"
        outside = (other for other in self.source.tensors if not LAYER.match(other))
        return next((other for other in outside if other.endswith("norm.weight")), "model.norm.weight")

    def parts(self, name: str) -> tuple[str, ...]:
        return self._origins[name]


def check_family(source: Checkpoint) -> None:
    """Refuse what cannot be turned. raises: UsageError"""
    kind = source.config.get("model_type")
    if kind not in TURNING:
        raise UsageError(
            f"{source.label}: a {kind} cannot be rotated: {_WHY_NOT.get(str(kind), 'its norms are not known here')}"
            f"; those that can: {', '.join(TURNING)}"
        )


def _then(*tensors: Tensor, first: Callable[..., Tensor], second: Callable[..., Any]) -> Tensor | Told:
    return second(first(*tensors))


def _module(name: str) -> str:
    """The last part of the name of the module that a tensor is of."""
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]


def _stream_axis(name: str) -> int | None:
    """Where a tensor that is no norm's has the channels of the residual stream; None where it has none."""
    module = _module(name)
    if module in _WRITING:
        return 0
    return 1 if (module in _READING or module == "embed_tokens") and not name.endswith(".bias") else None


def _embedding(source: Checkpoint) -> str:
    for name in source.tensors:
        if name.endswith(EMBEDDING):
            return name
    raise source.missing(f"model.{EMBEDDING}")
