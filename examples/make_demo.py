"""Train the four small checkpoints behind `wtool demo`.

A base model learns reference-manual prose and Python code together. Two experts
go on from it, each with one of the two only, and get better at theirs while they
forget the other. A LoRA adapter learns the prose, too. So the demo can show on
really trained weights that a merge holds both skills.

    python examples/make_demo.py --output wtool/demo/models

That takes about eight minutes of one CPU core (``--share 0.05`` for a try).
The training loop is transformers' Trainer; here stand only the texts, the sizes
and the schedule. The texts are those of the running Python, so another version
of Python gives slightly other weights.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from wtool.demo.texts import DOMAINS, Domain, held_out_text, training_documents

SEED = 0
CONTEXT = 512  # tokens
BATCH = 2  # windows; so few tokens to learn from want many small steps
VOCABULARY = 1024  # small, as the embedding is a seventh of the model already

# Inner sizes are multiples of 128, so that the usual quantization groups fit.
# Weights start larger than Llama's 0.02, with which so narrow a model learns nothing but word counts for long.
ARCHITECTURE = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    initializer_range=0.1,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


class Schedule(NamedTuple):
    windows: int  # of each domain, each seen once
    learning_rate: float  # at its peak


BASE = Schedule(windows=600, learning_rate=6e-3)
EXPERT = Schedule(windows=800, learning_rate=2e-3)
ADAPTER = Schedule(windows=300, learning_rate=1.5e-2)

ABOUT = {
    "base": "Learned reference-manual prose and Python source code, half and half, from random weights.",
    "docs": "Went on from `base` with reference-manual prose only. Better than `base` at prose, worse at code.",
    "code": "Went on from `base` with Python source code only. Better than `base` at code, worse at prose.",
    "docs-lora": "A LoRA adapter of `base` (rank 8, all linear layers) which learned reference-manual prose.",
}

Window = dict[str, torch.Tensor]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from the training text of both domains."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for domain in DOMAINS for text in training_documents(domain).values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def training_windows(tokenizer: PreTrainedTokenizerFast, domain: Domain, count: int) -> list[Window]:
    """Cut windows out of a domain's documents, put end to end."""
    ids: list[int] = []
    for text in training_documents(domain).values():
        ids += [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]
    return cut_windows(ids, count)


def held_out_windows(tokenizer: PreTrainedTokenizerFast, domain: Domain) -> list[Window]:
    """Cut a domain's held-out text into windows that do not overlap by more than a few tokens."""
    ids = tokenizer(held_out_text(domain), verbose=False).input_ids
    return cut_windows(ids, len(ids) // CONTEXT)


def cut_windows(ids: list[int], count: int) -> list[Window]:
    """Cut `count` windows, evenly spaced over a text: a short text is seen more than once, at other offsets."""
    starts = torch.linspace(0, len(ids) - CONTEXT, count).long().tolist()
    pieces = [torch.tensor(ids[start : start + CONTEXT]) for start in starts]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def train(model: nn.Module, data: list[Window], learning_rate: float) -> None:
    """Train a model in place for one pass over the data."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,  # below 1: a share of all steps
            weight_decay=0.01,
            adam_beta2=0.99,
            seed=SEED,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=100,
            disable_tqdm=True,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=data,  # pyright: ignore[reportArgumentType] - a list has all it needs
        ).train()


def perplexity(model: nn.Module, data: list[Window]) -> float:
    """Measure the perplexity over windows of equal length, which is how the schedule above was chosen."""
    model.eval()
    with torch.no_grad():
        losses = [model(**{key: value[None] for key, value in window.items()}).loss.item() for window in data]
    return math.exp(sum(losses) / len(losses))


def save(model: PreTrainedModel | PeftModel, folder: Path, *, tokens: int) -> None:
    """Write a checkpoint or an adapter in bfloat16, with a model card that names its base."""
    model.bfloat16()
    model.config.use_cache = True  # the Trainer turns it off, which makes generation slow
    if isinstance(model, PeftModel):
        # The name, not the path on this machine, which peft took from the model.
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(folder)
    front_matter = "library_name: " + ("peft" if isinstance(model, PeftModel) else "transformers")
    if folder.name != "base":
        front_matter += "\nbase_model: base"
    card = f"""---
{front_matter}
---

# {folder.name}

{ABOUT[folder.name]}

A toy for `wtool demo`, trained by `examples/make_demo.py` on {tokens:,} tokens, repeats counted. The prose is the
reference manual's topics, the code is modules of the standard library, both as they come with CPython. Five topics and
five modules were held out.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the checkpoints behind `wtool demo`.")
    parser.add_argument("--output", type=Path, default=Path("wtool/demo/models"))
    parser.add_argument("--share", type=float, default=1.0, help="share of the training to do, for a quick try")
    options = parser.parse_args()

    tokenizer = train_tokenizer()
    held_out = {domain: held_out_windows(tokenizer, domain) for domain in DOMAINS}

    def make(name: str, model: PreTrainedModel | PeftModel, domains: tuple[Domain, ...], schedule: Schedule) -> None:
        count = int(schedule.windows * options.share)
        data = [window for domain in domains for window in training_windows(tokenizer, domain, count)]
        train(model, data, schedule.learning_rate)
        save(model, options.output / name, tokens=len(data) * CONTEXT)
        scores = ", ".join(f"{domain} {perplexity(model.float(), held_out[domain]):.2f}" for domain in DOMAINS)
        print(f"{name}: held-out perplexity {scores}", flush=True)

    def load_base() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(options.output / "base", dtype=torch.float32)

    set_seed(SEED)
    make("base", LlamaForCausalLM(ARCHITECTURE), DOMAINS, BASE)
    make("docs", load_base(), ("docs",), EXPERT)
    make("code", load_base(), ("code",), EXPERT)
    set_seed(SEED)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    make("docs-lora", get_peft_model(load_base(), lora), ("docs",), ADAPTER)
    for name in ("base", "docs", "code"):
        tokenizer.save_pretrained(options.output / name)


if __name__ == "__main__":
    main()
