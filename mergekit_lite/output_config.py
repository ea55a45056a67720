"""The output's config.json: the donor's, agreeing with the weights that are written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from wtool.checkpoint import Checkpoint, TensorInfo
from wtool.checkpoint.tied import embedding_name, head_name, is_tied
from wtool.dtypes import FLOATS, config_name
from wtool.errors import UsageError
from wtool.layer_rules import depth_key, text_config
from wtool.layer_stack import with_layers, with_text_config

from .parameters import LAYER


def output_config(config: Mapping[str, Any], outputs: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """A configuration that tells the type of the weights, and whether the head is tied."""
    if not config:
        return {}
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    floats = [info for info in outputs.values() if info.dtype in FLOATS]
    if floats:
        kinds: Counter[str] = Counter()
        for info in floats:
            kinds[info.dtype] += info.nbytes
        result["torch_dtype" if "torch_dtype" in result else "dtype"] = config_name(max(kinds, key=lambda k: kinds[k]))
    if head_name(outputs) and is_tied(result):
        result["tie_word_embeddings"] = False  # an input has a head of its own, so the output does
    return result


def with_stack(config: Mapping[str, Any], layers: Sequence[int], part: str | None = None) -> dict[str, Any]:
    """The configuration of a model whose layers are these of the donor's.

    layers: the numbers of the donor's layers that the output's are like, each from 0
    part:   the key of the configuration that is about them; None for the language model's
    raises: UsageError if the family cannot express it
    """
    if not config:
        return {}
    if part is not None:
        return {**config, part: with_stack(config[part], layers)}
    text = text_config(config)
    key = depth_key(text)
    if max(layers) < text[key]:
        return with_layers(config, layers)
    alike = with_text_config(config, {**text, key: 1})
    if with_layers(config, [0]) != alike or with_layers(config, [text[key] - 1]) != alike:
        raise UsageError(
            f"a slice takes layer {max(layers)}, but the model that gives config.json has {text[key]} layers and tells "
            "something of each of them; name a deeper one as base_model"
        )
    return with_text_config(config, {**text, key: len(layers)})


def depth_in(config: Mapping[str, Any], part: str | None = None) -> int | None:
    """How many layers a configuration tells of; None where it does not."""
    try:
        text = text_config(config if part is None else config[part])
        return text[depth_key(text)]
    except UsageError:
        return None


def config_problems(
    config: Mapping[str, Any], outputs: Mapping[str, TensorInfo], sources: Sequence[Checkpoint]
) -> list[str]:
    """Where the configuration and the weights, or the models, do not agree."""
    problems: list[str] = []
    kinds = {source.label: source.config.get("model_type") for source in sources if source.config}
    if len(set(kinds.values())) > 1:
        problems.append("models of several kinds: " + ", ".join(f"{label} is {kind}" for label, kind in kinds.items()))
    embedding = embedding_name(outputs)
    size = config.get("vocab_size")
    if embedding and isinstance(size, int) and outputs[embedding].shape[0] != size:
        rows = outputs[embedding].shape[0]
        problems.append(f"config.json has vocab_size {size}, but '{embedding}' has {rows} rows")
    layers = config.get("num_hidden_layers")
    counted = _layers(outputs)
    if isinstance(layers, int) and counted and counted < layers:
        problems.append(f"config.json has num_hidden_layers {layers}, but the weights have {counted} layers")
    return problems


def _layers(names: Mapping[str, Any]) -> int:
    return max((int(match[2]) + 1 for name in names if (match := LAYER.match(name))), default=0)
