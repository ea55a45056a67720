"""The output's vocabulary: whose tokens, how many rows, which tensors have one for each of them.

Without a word in the recipe, models that have the same tokens keep them. Where one model has all tokens of the others
by the same numbers (a fine-tune that adds <|im_start|>), the output has that model's, so no model loses a token and no
number changes; where several have (an embedding padded to a round size), the base's or else the first one's. Anything
else is for the recipe's `tokenizer` to say.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wtool.checkpoint import Checkpoint, TensorInfo
from wtool.checkpoint.tied import embedding_name
from wtool.pieces import Pieces
from wtool.plan import Told

from . import token_rows
from .token_rows import RowMap

# The last part of a module's name, where it has a row, or a bias, for each token.
TOKEN_MODULES = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed|shared|embeddings?|embed_out"
    r"|lm_head|output|decoder|predictions|proj_out|head)\.(weight|bias)$|(^|\.)final_logits_bias$"
)
# What numbers tokens in config.json: bos_token_id, image_token_index, decoder_start_token_id, …
TOKEN_NUMBER = re.compile(r"_token(_ids?|_index)?$")
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class NewVocabulary:
    """The output's tokens, where an input has others, or other rows for them: what `steps.Vocabulary` asks for."""

    rows: RowMap
    counts: frozenset[int]  # rows of the models' embeddings
    tokenizer_of: Checkpoint  # the model whose tokenizer the output has, perhaps with more tokens
    files: Mapping[str, bytes | Path]
    problems: Sequence[str] = field(default=())
    warnings: Sequence[str] = field(default=())

    @property
    def size(self) -> int:
        """Rows of the output's embedding."""
        return self.rows.size

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json, with the number of rows and the numbers of the tokens that it names."""
        result = self._renumbered(config, self.tokenizer_of.config)
        text = config.get("text_config")
        if isinstance(text, dict):
            theirs = self.tokenizer_of.config.get("text_config")
            result["text_config"] = self._renumbered(text, theirs if isinstance(theirs, dict) else {})
        return result

    def _renumbered(self, config: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {key: value for key, value in theirs.items() if TOKEN_NUMBER.search(key) and _is_number(value)}
        size = {"vocab_size": self.size} if "vocab_size" in config else {}
        return {**config, **numbers, **size}

    def axis(self, name: str, info: TensorInfo) -> int | None:
        """The axis of a tensor that counts tokens, told from its name and as many rows as an embedding has."""
        if not TOKEN_MODULES.search(name):
            return None
        return next((axis for axis, length in enumerate(info.shape) if length in self.counts), None)

    def shape(self, axis: int, info: TensorInfo) -> TensorInfo:
        """What becomes of such a tensor in the output."""
        shape = (*info.shape[:axis], self.size, *info.shape[axis + 1 :])
        return replace(info, shape=shape)

    def beside(self, sources: Sequence[int]) -> list[int]:
        """The models that are not among a step's inputs, and have rows that those lack."""
        return token_rows.beside(self.rows, sources)

    def aligned(
        self, function: Callable[..., Pieces | Told], axis: int, sources: Sequence[int], count: int
    ) -> Callable[..., Pieces | Told]:
        """The function of the first `count` tensors, with their rows in the output's order; sources: of each tensor."""
        return token_rows.aligned(function, self.rows, axis, sources, count)

    def scratch(self, info: TensorInfo, infos: Sequence[TensorInfo], sources: Sequence[int], axis: int) -> int:
        """Bytes that the rows in the output's order take while a step runs."""
        return token_rows.scratch(self.rows, info, infos, sources, axis)


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of a model's input embedding; None where none is found."""
    tensors = checkpoint.tensors
    if name := embedding_name(tensors):
        return tensors[name].shape[0]
    found = [
        info.shape[0]
        for name, info in tensors.items()
        if TOKEN_MODULES.search(name) and "embed" in name and len(info.shape) == 2
    ]
    return max(found, default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and all(isinstance(each, int) for each in value))
