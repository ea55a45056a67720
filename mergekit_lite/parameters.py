"""From settings to numbers: which value a parameter has for a given tensor.

A setting is a constant, a gradient, or a list of filters. A gradient spreads its values evenly over the layers and
interpolates between them: layer l of L stands at l / (L - 1). What comes before the layers (embeddings) stands at
the first value, what comes after (the final norm, the head) at the last. mergekit puts those at the first too,
which is one of the deliberate differences (docs/merging.md).
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from wtool.errors import UsageError

from .methods.table import Parameter
from .places import Filtered, Setting

LAYER = re.compile(r"^(.*?\.|)(\d+)\.")  # the first number among a name's parts is the layer's
BEFORE_LAYERS = re.compile(r"embed(?!_out)|(^|[._])pre_|wte|wpe|patch|\.conv\d")
AFTER_LAYERS = re.compile(
    r"(^|[._])(norm|layer_?norm|ln_f|ln_post|final\w*|lm_head|embed_out|proj_out|output|score|classifier|cls|pooler|head)"
    r"([._]|$)"
)


class Depths:
    """Where each tensor stands between the first layer (0) and the last (1)."""

    def __init__(self, names: Iterable[str]):
        self._last: dict[str, int] = {}
        for name in names:
            if match := LAYER.match(name):
                stack, layer = match[1], int(match[2])
                self._last[stack] = max(layer, self._last.get(stack, 0))

    def of(self, name: str) -> float:
        if match := LAYER.match(name):
            return int(match[2]) / max(self._last[match[1]], 1)
        return 1.0 if is_after_layers(name) else 0.0


def is_after_layers(name: str) -> bool:
    """Whether a tensor outside of the layers comes after the last of them."""
    return AFTER_LAYERS.search(name) is not None and BEFORE_LAYERS.search(name) is None


def value_at(setting: Setting, name: str, depth: float) -> bool | float | str | None:
    """A setting's value for one tensor; None if no filter fits."""
    if isinstance(setting, list):
        filters = [item for item in setting if isinstance(item, Filtered)]
        if not filters:
            return _interpolate([float(item) for item in setting if not isinstance(item, Filtered)], depth)
        for item in filters:
            if item.filter in (None, "*") or item.filter in name:
                return value_at(item.value, name, depth)
        return None
    return setting


def _interpolate(values: Sequence[float], depth: float) -> float:
    if not values:
        raise UsageError("a gradient needs one value at least")
    position = depth * (len(values) - 1)
    below = min(int(position), max(len(values) - 2, 0))
    if len(values) == 1:
        return values[0]
    share = position - below
    return (1.0 - share) * values[below] + share * values[below + 1]


def resolve(
    name: str, parameter: Parameter, settings: Sequence[Mapping[str, Setting]], tensor: str, depth: float, whose: str
) -> bool | float | str:
    """The checked value of a parameter for a tensor.

    settings: where to look, the most specific first
    whose:    how an error names the model or recipe
    """
    for setting in settings:
        if name in setting:
            value = value_at(setting[name], tensor, depth)
            if value is not None:
                return parameter.check(value, f"{whose}: '{name}'")
    if parameter.is_required:
        raise UsageError(f"{whose}: '{name}' has no value for tensor '{tensor}', and no default")
    return parameter.default
