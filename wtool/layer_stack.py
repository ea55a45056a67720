"""Depth surgery: a checkpoint that has only some of its layers, in any order, with a configuration to match."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import Checkpoint, View
from wtool.errors import Mismatch, UsageError
from wtool.layer_rules import Config, check_rules, dense_first, depth_key, explicit, text_config
from wtool.linear_names import LAYER, longest_stack

if TYPE_CHECKING:
    import torch

MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
# Lists of layer numbers. Any other list as long as the model is deep has one entry a layer, but for those of tokens.
NUMBER_LISTS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
NOT_PER_LAYER = re.compile(r"token|architectures|label|limit|languages")
PATTERN_STRINGS = ("hybrid_override_pattern",)  # one letter a layer
BY_NUMBER = ("per_layer_config",)  # settings of single layers, by their numbers


def with_text_config(config: Config, text: Config) -> dict[str, Any]:
    """The configuration with another language model's part; what the outer part repeats of it follows."""
    before = text_config(config)
    if before is config:
        return dict(text)
    repeated = {key for key in config if key in text and key in before and config[key] == before[key] != text[key]}
    return {**config, "text_config": dict(text), **{key: text[key] for key in repeated}}


def with_layers(config: Config, layers: Sequence[int]) -> dict[str, Any]:
    """The configuration of the model that has only these layers.

    layers: numbers of the layers that stay, in their new order, each from 0 to the depth - 1
    raises: UsageError if a layer is not there, or if the family cannot express what would be left
    """
    text = text_config(config)
    key = depth_key(text)
    depth = text[key]
    _check_numbers(layers, depth)
    if list(layers) == list(range(depth)):
        return dict(config)
    check_rules(config, layers)
    cut = {**_cut_lists(explicit(text), depth, layers), **dense_first(text, layers), key: len(layers)}
    if "max_window_layers" in cut and "sliding_attention" in (cut.get("layer_types") or ()):
        cut["max_window_layers"] = cut["layer_types"].index("sliding_attention")
    return with_text_config(config, cut)


def _check_numbers(layers: Sequence[int], depth: int) -> None:
    if not layers:
        raise UsageError(f"no layer would be left of {depth}")
    for number in layers:
        if not 0 <= number < depth:
            raise UsageError(f"there is no layer {number}: the model has layers 0 to {depth - 1}")


def _cut_lists(text: Config, depth: int, layers: Sequence[int]) -> dict[str, Any]:
    """Cut what has an entry a layer, and renumber what holds layer numbers."""
    result = dict(text)
    extra = next((text[key] for key in MTP_KEYS if type(text.get(key)) is int), 0)
    for key, value in text.items():
        if key in NUMBER_LISTS and isinstance(value, list):
            result[key] = [new for new, old in enumerate(layers) if old in value]
        elif isinstance(value, list) and len(value) in (depth, depth + extra) and not NOT_PER_LAYER.search(key):
            result[key] = [value[number] for number in layers] + value[depth:]
        elif key in PATTERN_STRINGS and isinstance(value, str) and len(value) == depth:
            result[key] = "".join(value[number] for number in layers)
        elif key in BY_NUMBER and isinstance(value, dict):
            numbers = {str(old): own for old, own in value.items()}
            result[key] = {str(new): numbers[str(old)] for new, old in enumerate(layers) if str(old) in numbers}
    return result


class SomeLayers(View):
    """A view of a checkpoint that has only some of its layers, under new numbers."""

    def __init__(self, source: Checkpoint, layers: Sequence[int]):
        super().__init__(source)
        self.config = with_layers(source.config, layers)
        self.origins: Mapping[str, str] = _origins(source, layers)  # the source's name of every tensor
        self.tensors = {name: source.tensors[origin] for name, origin in self.origins.items()}

    def parts(self, name: str) -> tuple[str]:
        if name not in self.origins:
            raise self.missing(name)
        return (self.origins[name],)

    def read(self, name: str) -> "torch.Tensor":
        (origin,) = self.parts(name)
        return self.source.read(origin)


def keep_layers(source: Checkpoint, layers: Sequence[int]) -> SomeLayers:
    """The checkpoint with only these layers of its longest stack, renumbered from 0; a layer may be named twice.

    Layers for multi-token prediction, stored under the numbers after the last layer's, come after the new last one:
    there transformers' speculative decoding (`generate(use_mtp=True)`) looks for them. Opened without it, transformers
    calls them unexpected, as its classes know these layers under the published models' numbers alone.

    raises: UsageError if a layer is not there or the family cannot express the rest, Mismatch if config.json and
        tensors disagree on the depth
    """
    return SomeLayers(source, layers)


def _origins(source: Checkpoint, layers: Sequence[int]) -> dict[str, str]:
    """The source's tensor for every new name, in the source's order."""
    text = text_config(source.config)
    depth = text[depth_key(text)]
    stack = longest_stack(source.tensors)
    found = {name: match for name in source.tensors if (match := LAYER.match(name)) and match[1] == stack}
    held = {int(match[2]) for match in found.values()}
    if not held >= set(range(depth)):
        raise Mismatch(f"{source.label}: config.json says {depth} layers, the tensors '{stack}*' are of {len(held)}")
    origins: dict[str, str] = {}
    for name in source.tensors:
        match = found.get(name)
        if match is None:
            origins[name] = name
            continue
        old = int(match[2])
        new = [n for n, kept in enumerate(layers) if kept == old] if old < depth else [old - depth + len(layers)]
        origins |= {f"{stack}{number}{name[match.end(2) :]}": name for number in new}
    return origins
