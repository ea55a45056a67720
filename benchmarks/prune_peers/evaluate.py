"""Perplexity, and divergence from the whole model, of pruned checkpoints of any shape on held-out texts.

    python evaluate.py MODEL RESULTS.json TEXT.txt... -- FOLDER...

Every checkpoint is opened by plain transformers in float32, and must hold exactly the tensors that its configuration
asks for. RESULTS.json maps a folder's name to {"parameters": ..., "texts": {text: {"kl": nats a token, "ppl": ...}}}
and is added to after each; names that it has are skipped, and MODEL itself is `whole`. Text is read in 3 windows of 512
tokens spread evenly over it; perplexity is over all tokens, divergence over every third position.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

WINDOWS, LENGTH, STRIDE, CHUNK = 3, 512, 3, 192  # CHUNK: positions whose logits are held at a time


@dataclass(frozen=True)
class Divergence:
    """Of a model from the whole one on a text."""

    kl: float  # nats a token, of the whole model's distribution from this one's
    ppl: float


def held_out_windows(model: Path, texts: list[Path]) -> dict[str, Tensor]:
    """Token ids [windows, length] of every text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: dict[str, Tensor] = {}
    for path in texts:
        ids = torch.tensor(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])
        starts = [i * (len(ids) - LENGTH) // (WINDOWS - 1) for i in range(WINDOWS)]
        found[path.stem] = torch.stack([ids[start : start + LENGTH] for start in starts])
    return found


def opened(folder: Path) -> PreTrainedModel:
    """A checkpoint as plain transformers opens it, in float32."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, told = loaded
    amiss = {what: sorted(names) for what, names in told.items() if names}
    if amiss:
        raise SystemExit(f"{folder}: transformers complains: {amiss}")
    return model.eval()


def output_layer(model: PreTrainedModel) -> nn.Module:
    """From hidden states to logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module), "a causal language model has one"
    return head


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the output layer reads of windows [windows, length], float32 [windows, length, hidden]."""
    return torch.cat([model.base_model(input_ids=row[None], use_cache=False).last_hidden_state for row in ids])


def divergence(head: nn.Module, states: Tensor, whole_head: nn.Module, whole: Tensor, ids: Tensor) -> Divergence:
    """Of a model whose output layer reads `states` from the one that reads `whole`, [windows, length, hidden] each."""
    kl, loss = [], []
    for window, row in enumerate(ids):
        for first in range(0, LENGTH, CHUNK):
            part = slice(first, min(first + CHUNK, LENGTH))
            logits = head(states[window, part])
            following = row[part.start + 1 : part.stop + 1]
            loss.append(cross_entropy(logits[: len(following)], following, reduction="sum"))
            ours = log_softmax(logits[::STRIDE], dim=-1)
            full = log_softmax(whole_head(whole[window, part][::STRIDE]), dim=-1)
            kl.append(full.exp().mul_(full - ours).sum(1))
    tokens = len(ids) * (LENGTH - 1)
    return Divergence(torch.cat(kl).mean().item(), (torch.stack(loss).sum() / tokens).exp().item())


@torch.inference_mode()
def main() -> None:
    model_folder, results = Path(sys.argv[1]), Path(sys.argv[2])
    end = sys.argv.index("--")
    texts, folders = ([Path(each) for each in listed] for listed in (sys.argv[3:end], sys.argv[end + 1 :]))
    disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    known = json.loads(results.read_text()) if results.exists() else {}
    missing = {folder.name: folder for folder in folders if folder.name not in known}
    missing |= {} if "whole" in known else {"whole": model_folder}
    if not missing:
        return
    whole = opened(model_folder)
    windows = held_out_windows(model_folder, texts)
    reference = {text: hidden_states(whole, ids) for text, ids in windows.items()}
    whole_head = output_layer(whole)
    for name, folder in missing.items():
        start = time.perf_counter()
        model = opened(folder)
        head = output_layer(model)
        found = {
            text: divergence(head, hidden_states(model, ids), whole_head, reference[text], ids)
            for text, ids in windows.items()
        }
        texts_found = {text: asdict(each) for text, each in found.items()}
        known[name] = {"parameters": model.num_parameters(), "texts": texts_found}
        results.write_text(json.dumps(known, indent=1) + "\n")
        line = "  ".join(f"{text} {each.ppl:.2f} ({each.kl:.3f})" for text, each in found.items())
        print(f"{name:32} {line}  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
