"""Tiny models with tokenizers of their own, whose rows tell what they are: number × 1000 + row, in every column."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wtool.loading import quiet

CATS = "the cat sat on the mat and the dog sat on the log " * 3
DREAMS = "colourless green ideas sleep furiously and the ideas dream " * 3
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PIECES = 270


def bpe(text: str = CATS, size: int = PIECES, added: Sequence[tuple[str, bool]] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; added: (token, whether it is special)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def saved(
    folder: Path,
    number: int,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    rows: int | None = None,
    tied: bool = False,
    kind: str = "llama",
) -> Path:
    """Save a model; the head, where it is not tied, has the embedding's rows with the other sign.

    rows: of the embedding; as many as there are tokens if None
    """
    count = rows or (len(tokenizer) if tokenizer else PIECES)
    with quiet():
        model: Any = _gpt2(count) if kind == "gpt2" else _llama(count, tied)
        own = number * 1000.0 + torch.arange(count, dtype=torch.float32)[:, None]
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(own.expand(-1, 8))
            if not tied and kind == "llama":
                model.get_output_embeddings().weight.copy_(-own.expand(-1, 8))
        model.save_pretrained(folder)
        if tokenizer:
            tokenizer.save_pretrained(folder)
    return folder


def _llama(rows: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def _gpt2(rows: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1)
    )


def rows_of(folder: Path, name: str = EMBEDDING) -> list[float]:
    """The first column of a tensor that counts tokens."""
    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    assert bool((tensors[name] == tensors[name][:, :1]).all())  # every column is the same, so the first tells all
    return tensors[name][:, 0].tolist()
