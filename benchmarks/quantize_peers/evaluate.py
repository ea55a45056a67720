"""Perplexity, and divergence from the full model, of quantized checkpoints on held-out texts.

    python evaluate.py MODEL TEXTS RESULTS.json CHECKPOINT... [rtn:BITS:GROUP...]

The quantized matrices alone are put into the full model, in float32, so that what is measured is the weights and not a
runtime. RESULTS.json maps the checkpoint's name to {text: {"kl": nats a token, "ppl": ...}} and is added to after each;
names it already has are skipped. The full model's hidden states are kept beside it, for other runs.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from decode import decoded, round_to_nearest
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

WINDOWS, LENGTH = 8, 512  # of each text, spread evenly over it
LARGE = 65536  # tokens; of a vocabulary so many times as large, one position of so many is looked at


@dataclass(frozen=True)
class Divergence:
    """Of a model from the full one on a text."""

    kl: float  # nats a token, of the full model's distribution from this one's
    ppl: float


def held_out_windows(model: Path, texts: Path) -> dict[str, Tensor]:
    """Token ids [windows, length] of every text in a folder; each window begins with what begins a text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    begin = tokenizer("")["input_ids"]
    found: dict[str, Tensor] = {}
    for path in sorted(texts.glob("*.txt")):
        ids = torch.tensor(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])
        starts = [i * (len(ids) - LENGTH) // (WINDOWS - 1) for i in range(WINDOWS)]
        rows = [torch.tensor([*begin, *ids[start : start + LENGTH].tolist()])[:LENGTH] for start in starts]
        found[path.stem] = torch.stack(rows)
    return found


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the output layer reads, float32 [length, hidden]."""
    return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def reference_states(model: PreTrainedModel, windows: dict[str, Tensor], beside: Path) -> dict[str, Tensor]:
    """The full model's [windows, length, hidden] for every text, from an earlier run where there was one."""
    key = sha256(repr([(name, ids.tolist()) for name, ids in windows.items()]).encode())
    for weight in model.parameters():
        key.update(weight.detach().numpy().tobytes())
    path = beside.with_name(f"reference-{key.hexdigest()[:16]}.pt")
    if not path.exists():
        states = {name: torch.stack([hidden_states(model, row) for row in ids]) for name, ids in windows.items()}
        torch.save(states, path)
    return torch.load(path)


def looked_at(model: PreTrainedModel) -> slice:
    """The positions of a window where distributions are compared: all, or evenly spread over it."""
    return slice(None, None, max(1, model.get_parameter("lm_head.weight").shape[0] // LARGE))


def divergence(model: PreTrainedModel, ids: Tensor, reference: Tensor) -> Divergence:
    """Over every window [windows, length]; perplexity of the tokens that follow what is looked at."""
    head: nn.Module = model.get_submodule("lm_head")
    kl, loss, places = 0.0, 0.0, looked_at(model)
    for row, states in zip(ids, reference, strict=True):
        ours, full = (log_softmax(head(each[places]), dim=-1) for each in (hidden_states(model, row), states))
        following = row[1:][places, None]
        loss -= ours[: len(following)].gather(1, following).mean().item()
        kl += full.exp().mul_(full.sub_(ours)).sum(1).mean().item()
    return Divergence(kl / len(ids), float(torch.tensor(loss / len(ids)).exp()))


def put(model: PreTrainedModel, original: dict[str, Tensor], checkpoint: str) -> None:
    """Replace the linears of the model's blocks by a checkpoint's, all of them."""
    if checkpoint == "full":
        replaced = original
    elif checkpoint.startswith("rtn:"):
        _, bits, group = checkpoint.split(":")
        replaced = {name: round_to_nearest(weight, int(bits), int(group)) for name, weight in original.items()}
    else:
        replaced = dict(decoded(Path(checkpoint)))
    if replaced.keys() != original.keys():
        raise SystemExit(f"{checkpoint}: these linears differ: {sorted(replaced.keys() ^ original.keys())[:5]}")
    for name, weight in replaced.items():
        model.get_parameter(f"{name}.weight").data.copy_(weight)


def linears(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the weights of every linear but the output layer."""
    modules = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    return {name: module.weight.data.bfloat16() for name, module in modules.items() if name != "lm_head"}


@torch.inference_mode()
def main() -> None:
    model_folder, texts, results = (Path(argument) for argument in sys.argv[1:4])
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    known = json.loads(results.read_text()) if results.exists() else {}
    missing = [checkpoint for checkpoint in sys.argv[4:] if Path(checkpoint).name not in known]
    if not missing:
        return
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    windows = held_out_windows(model_folder, texts)
    original = linears(model)
    reference = reference_states(model, windows, results)
    for checkpoint in missing:
        start = time.perf_counter()
        name = Path(checkpoint).name
        put(model, original, checkpoint)
        known[name] = {text: asdict(divergence(model, ids, reference[text])) for text, ids in windows.items()}
        results.write_text(json.dumps(known, indent=1) + "\n")
        line = "  ".join(f"{text} {found['kl']:.4f} / {found['ppl']:.2f}" for text, found in known[name].items())
        print(f"{name:24} {line}  ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
