"""The configuration of what is left when widths, heads and experts are taken out, or why there can be none."""

from collections.abc import Mapping
from typing import Any

from wtool.errors import UsageError
from wtool.layer_rules import text_config
from wtool.layer_stack import with_layers, with_text_config

from .families import Family, family_of
from .structure import Kept, Shape, cut_shape


def with_shape(config: Mapping[str, Any], shape: Shape, kept: Kept) -> dict[str, Any]:
    """The configuration of the model of which only `kept` stays.

    shape: before the cut
    raises: UsageError if the family has no configuration for what would be left
    """
    result = with_layers(config, kept.layers)
    if not kept.widths:
        return result
    family, after = family_of(config), cut_shape(shape, kept)
    text = dict(text_config(result))
    _check_heads(family, config, after)
    _check_experts(after)
    for size, spellings in family.keys.items():
        for key in [key for key in spellings if key in text] or spellings[:1]:
            text[key] = getattr(after, size)
    if family.has_head_dim and (shape.hidden, shape.heads) != (after.hidden, after.heads):
        text["head_dim"] = after.head_dim
        _check_rotary_factors(text, after)
    return with_text_config(result, text)


def _check_heads(family: Family, config: Mapping[str, Any], after: Shape) -> None:
    """Refuse heads that the family has no words for."""
    kind, hidden, heads = config.get("model_type"), after.hidden, after.heads
    if not family.has_head_dim and hidden != heads * after.head_dim:
        raise UsageError(
            f"a {kind} has no head_dim of its own, so hidden must be heads × {after.head_dim}: "
            f"{heads} heads go with hidden {heads * after.head_dim}, not with {hidden}"
        )
    if family.hidden_over_heads and hidden % heads:
        fitting = [number for number in range(1, hidden + 1) if hidden % number == 0]
        near = [*[n for n in fitting if n < heads][-1:], *[n for n in fitting if n > heads][:1]]
        raise UsageError(
            f"a {kind} needs a hidden size that is a multiple of its heads: {hidden} is none of {heads}, "
            f"but of {' and '.join(map(str, near))}"
        )


def _check_experts(after: Shape) -> None:
    if after.experts is not None and after.top_k is not None and after.top_k > after.experts:
        raise UsageError(
            f"{after.experts} experts would be left, but each token goes to {after.top_k} (num_experts_per_tok)"
        )


def _check_rotary_factors(text: Mapping[str, Any], after: Shape) -> None:
    """Refuse what phi3's configuration class refuses: it measures its rotary factors against hidden / heads."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    factors = rope.get("short_factor")
    if text.get("model_type") != "phi3" or factors is None:
        return
    share = rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    if int(after.hidden // after.heads * share) // 2 != len(factors):
        raise UsageError(
            f"a phi3 with longrope needs hidden / heads to stay {after.head_dim}: "
            f"{after.heads} heads go with hidden {after.heads * after.head_dim}, not with {after.hidden}"
        )
