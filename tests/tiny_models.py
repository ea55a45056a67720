"""Small models and a tokenizer for tests: random weights, a vocabulary learnt from the language reference."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from wtool.loading import quiet

VOCABULARY = 320
TEXT = topics["for"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.5,  # far from uniform, so that there is something to get wrong
}


@cache
def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer.

    bos: whether it puts <s> in front of a text
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT, topics["while"]], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A random llama in float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings)).eval()


def saved(model: PreTrainedModel, folder: Path, *, bos: bool = True, with_tokenizer: bool = True) -> Path:
    """Save a model with the tokenizer, as any user would."""
    with quiet():
        model.save_pretrained(folder)
        if with_tokenizer:
            tokenizer(bos).save_pretrained(folder)
    return folder
