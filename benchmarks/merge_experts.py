"""Experts to merge: LoRA fine-tunes of one model, each on a kind of text of its own, and held-out text of each kind.

    python benchmarks/merge_experts.py BASE SHAKESPEARE OUT [--seed 0] [--steps 48] [--rate 1e-3]

SHAKESPEARE and the Debian packages are those of `quantize_peers/texts.py`. OUT gets bible/, fortunes/ and shakespeare/,
checkpoints in bfloat16 with the adapters (rank 16, on all linear layers of the blocks) merged into them, rounded to the
nearest, and held/*.txt, on which none was trained. The seed draws windows and adapters.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from quantize_peers.texts import bible, fortunes, held_out, plays
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

LENGTH, BATCH = 256, 4  # tokens of a window, windows of a step


def training_texts(shakespeare: Path) -> dict[str, str]:
    """What each expert is trained on; nothing of it is held out."""
    return {
        "bible": bible("Genesis1:1-Genesis50:26", "Psalms1:1-Psalms100:5"),
        "fortunes": fortunes("science", "politics", "work", "wisdom", "cookie", "definitions"),
        "shakespeare": plays(shakespeare, "twelfth_night", "hamlet", "othello"),
    }


def train(base: Path, text: str, out: Path, seed: int, steps: int, rate: float) -> None:
    """One expert."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text)["input_ids"]
    starts = random.Random(seed).sample(range(0, len(ids) - LENGTH, LENGTH), steps * BATCH)
    rows: Any = [{"input_ids": ids[start : start + LENGTH], "labels": ids[start : start + LENGTH]} for start in starts]
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned: Any = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=True,
    )
    Trainer(model=tuned, args=arguments, train_dataset=rows, data_collator=default_data_collator).train()
    tuned.merge_and_unload().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("shakespeare", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args()
    texts = training_texts(given.shakespeare)
    (given.out / "held").mkdir(parents=True, exist_ok=True)
    for name, text in held_out(given.shakespeare).items():
        if name in texts:
            (given.out / "held" / f"{name}.txt").write_text(text)
    for name, text in texts.items():
        if not (given.out / name / "model.safetensors").exists():
            train(given.base, text, given.out / name, given.seed, given.steps, given.rate)


if __name__ == "__main__":
    main()
