"""Tied embeddings: the output head that is the input embedding again, and is not in the file.

Which of two names is the head and which the embedding is a convention of the families, kept here as a table.
"""

from collections.abc import Collection
from typing import Any

HEADS = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "backbone.embeddings.weight",
    "model.embeddings.weight",
    "shared.weight",
    "tok_embeddings.weight",
)
# Families whose configuration class ties the embeddings unless config.json says otherwise. transformers leaves
# a value that equals the class's default out of config.json, so the table is needed to read one.
TIED_BY_DEFAULT = frozenset(
    {"gpt2", "gemma", "gemma2", "gemma3", "gemma3_text", "opt", "bloom", "t5", "cohere", "cohere2", "mamba", "smollm3"}
)


def head_name(names: Collection[str]) -> str | None:
    """The name of the output head among tensor names, None if it is not there."""
    return next((name for name in HEADS if name in names), None)


def embedding_name(names: Collection[str]) -> str | None:
    """The name of the input embedding among tensor names, None if it is none of the known ones."""
    return next((name for name in EMBEDDINGS if name in names), None)


def is_tied(config: dict[str, Any]) -> bool:
    """Whether config.json ties the output head to the input embedding."""
    default = config.get("model_type") in TIED_BY_DEFAULT
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return bool(config.get("tie_word_embeddings", default if nested is None else nested))
