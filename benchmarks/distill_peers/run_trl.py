"""TRL's GKDTrainer on windows of token ids: forward KL, off-policy, AdamW with a constant learning rate, float32 or
mixed precision (--bf16; the teacher in bfloat16 then).

    python run_trl.py TEACHER STUDENT OUT WINDOWS.jsonl HELD.jsonl STEPS BATCH LR [--checkpointing] [--bf16]

It does what `wtool distill --evaluate-every STEPS` does: judges the held-out windows before and after, writes a
checkpoint to go on from, and the student. The order of the windows is the Trainer's for seed 0 in both; that they are
the same shows in the loss of every step. The last line says {"seconds", "tokens_per_second", "losses", "held_out"}.
Without arguments it imports what it needs and ends.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

IGNORED = -100  # TRL's label of what is not learnt


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch in which all but the first token of each window is learnt.

    The first one has no prediction; without its label TRL would count it, and divide the loss by one token more.
    """
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = IGNORED
    prompt = {"prompts": ids[:, :1], "prompt_attention_mask": torch.ones_like(ids[:, :1])}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **prompt}


def rows_of(path: str) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in Path(path).read_text().splitlines()])


def settings(out: str, steps: int, batch: int, lr: float, checkpointing: bool, bf16: bool) -> GKDConfig:
    """Plain forward KL, nothing sampled, and no other precision or penalty than wtool's run has."""
    return GKDConfig(
        output_dir=f"{out}.training",
        beta=0.0,
        lmbda=0.0,
        seq_kd=False,
        max_length=None,
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bf16,
        fp16=False,
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=steps,
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=steps,
        seed=0,
        data_seed=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    teacher, student, out, windows, held_out = sys.argv[1:6]
    steps, batch, lr = int(sys.argv[6]), int(sys.argv[7]), float(sys.argv[8])
    bf16 = "--bf16" in sys.argv
    train = rows_of(windows)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # TRL wants one; nothing is padded
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16 if bf16 else torch.float32),
        args=settings(out, steps, batch, lr, "--checkpointing" in sys.argv, bf16),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=rows_of(held_out),
        processing_class=tokenizer,
    )
    trainer.lmbda = -1.0  # it is compared by <= with a random number that may be 0
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.save_model(out)
    history = trainer.state.log_history
    tokens = steps * batch * (len(train[0]["input_ids"]) - 1)
    told = {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "held_out": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
    }
    print(f"\n{json.dumps(told)}", flush=True)


if __name__ == "__main__" and len(sys.argv) > 1:
    main()
