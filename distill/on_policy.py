"""Batches that the student writes itself, so that it learns from the teacher where its own words lead it.

Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD), 2023,
https://arxiv.org/abs/2306.13649: with a share λ of batches written by the student, all of them at λ = 1. Here the
first half of each window is what it goes on from, and only what it wrote is learnt.
"""

from collections.abc import Mapping
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data import IGNORED


def written_by_student(
    model: PreTrainedModel, batch: Mapping[str, Tensor], *, share: float, seed: int, end: int | None
) -> dict[str, Tensor]:
    """The batch, or by chance one whose windows' second halves the student has written anew.

    batch: as `data.Collate` lays it out
    share: of batches, in [0, 1]
    seed: of this batch, of the decision and of the words
    end: the token after which nothing is learnt; None where there is none

    returns: labels are those of written tokens alone; no longer than the batch was
    """
    if Random(seed).random() >= share:
        return dict(batch)
    ids = batch["input_ids"]
    half = max(1, int((batch["labels"] != IGNORED).sum(1).min()) // 2)
    devices = [model.device] if model.device.type == "cuda" else []
    before, cached = model.training, model.config.use_cache
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        model.eval()
        prompt = ids[:, :half].to(model.device)
        written = model.generate(  # pyright: ignore[reportCallIssue]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ids.shape[1] - half,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            eos_token_id=end,
            pad_token_id=0 if end is None else end,
            use_cache=True,
        ).to(ids.device)
        model.train(before)
        model.config.use_cache = cached
    labels = torch.full_like(written, IGNORED)
    labels[:, half - 1 : -1] = written[:, half:]
    if end is not None:
        ended = (written[:, half:] == end).cumsum(1) - (written[:, half:] == end).long() > 0
        labels[:, half - 1 : -1] = labels[:, half - 1 : -1].masked_fill(ended, IGNORED)
    return {"input_ids": written, "labels": labels, "numbers": batch["numbers"]}
