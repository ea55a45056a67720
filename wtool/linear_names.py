"""Which stored tensors are linear layers, told from names, shapes and config.json alone.

What is multiplied with activations in the numbered layers of the model's longest stack is; embeddings, the head,
norms, routers and other towers are not.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wtool.checkpoint.base import Checkpoint, TensorInfo
from wtool.checkpoint.tied import head_name
from wtool.dtypes import FLOATS
from wtool.layer_rules import text_config

LAYER = re.compile(r"^(.*?\.|)(\d+)\.")  # the first number among a name's parts is the layer's
NO_LINEAR = re.compile(
    r"(^|[._])(norm\w*|ln\w*|layernorm|layer_norm|\w*embed\w*|wte|wpe|conv\w*|bias|inv_freq)([._]|$)"
)
ROUTER = re.compile(r"(^|\.)(gate|router|router\.\w+|shared_expert_gate|expert_gate)\.weight$")
# Families whose weights lie as [in, out] on disk (transformers' Conv1D).
TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer, by its tensor."""

    tensor: str
    shape: tuple[int, int]  # out, in
    transposed: bool = False  # it lies as [in, out]

    @property
    def module(self) -> str:
        """The name without `.weight`."""
        return self.tensor.removesuffix(".weight")


def linear_layers(checkpoint: Checkpoint) -> tuple[dict[str, LinearLayer], dict[str, str]]:
    """Find the linear layers of a checkpoint.

    returns: the layers by their tensors' names; and of the other matrices why they are none, by name
    """
    config = checkpoint.config
    text = text_config(config)
    stack = longest_stack(checkpoint.tensors)
    depth = next((text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text), None)
    transposed = config.get("model_type") in TRANSPOSED
    layers: dict[str, LinearLayer] = {}
    others: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        if len(info.shape) < 2 or info.dtype not in FLOATS:
            continue
        reason = _no_linear(name, info, stack, depth)
        if reason:
            others[name] = reason
        else:
            rows, columns = info.shape
            layers[name] = LinearLayer(name, (columns, rows) if transposed else (rows, columns), transposed)
    return layers, others


def plain_modules(source: Checkpoint, left: Mapping[str, str]) -> list[str]:
    """The linear modules that stay as they are; the head is one even where it is the embedding again.

    left: the matrices that stay, as `linear_layers` tells them
    """
    head = head_name(source.tensors) or "lm_head.weight"
    names = dict.fromkeys([head, *(name for name in left if "embed" not in name)])
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _no_linear(name: str, info: TensorInfo, stack: str | None, depth: Any) -> str | None:
    match = LAYER.match(name)
    if match is None or match[1] != stack:
        return "outside the layers"
    if isinstance(depth, int) and int(match[2]) >= depth:
        return f"in layer {match[2]} of {depth} (multi-token prediction)"
    if ROUTER.search(name):
        return "a router of experts"
    if len(info.shape) > 2:
        return "experts fused in one tensor" if "expert" in name else f"has {len(info.shape)} dimensions"
    if not name.endswith(".weight") or NO_LINEAR.search(name.removesuffix(".weight")):
        return "not a linear layer by its name"
    return None


def longest_stack(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What stands before the layer's number in the stack with the most parameters."""
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        if match := LAYER.match(name):
            sizes[match[1]] = sizes.get(match[1], 0) + info.elements
    return max(sizes, key=lambda stack: sizes[stack]) if sizes else None
