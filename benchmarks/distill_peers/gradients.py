"""How near a step by a cached teacher is to a step by the whole teacher: the cosine of the two gradients.

    python gradients.py TEACHER STUDENT WINDOWS.jsonl [COUNT=4]

The gradient is that of the forward KL by all the student's parameters over COUNT windows, in float32. wtool's caches
are written and read again. DistillKit keeps k ids and a curve through their log-probabilities; here these are exact,
which can only help it, and the bytes are those of its own two settings with ids of as many bits as the vocabulary
needs. Of the mass on other tokens it makes nothing (its default), or spreads it evenly over them.
"""

import json
import sys
from collections.abc import Callable
from math import log

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.kinds import Divergence
from distill.losses import divergence, sampled_divergence, top_k_divergence
from distill.signal_codec import bytes_per_token, decode, encode
from distill.signals import Sampled, TopK, sample, top_k

OURS = (8, 32, 36, 100, 128)  # 36 and 100 take as much as DistillKit's two settings at most, at 16 bits an id
DISTILLKIT = {"recommended": (128, 56), "budget": (50, 14)}  # k, and bytes for what is kept of log-probabilities
FORWARD = Divergence("forward-kl")

Loss = Callable[[Tensor], Tensor]  # logits [tokens, V] -> [tokens]


def signals(said: Tensor) -> dict[str, tuple[float, Loss]]:
    """Name -> bytes a token, and the loss.

    said: the teacher's logits [tokens, V]
    """
    vocabulary = said.shape[1]
    found: dict[str, tuple[float, Loss]] = {}
    for k in OURS:
        top = decode(encode(top_k(said, k), vocabulary), "top-k", vocabulary)
        drawn = decode(encode(sample(said, k, generator=torch.Generator().manual_seed(0)), vocabulary), "sample",
                       vocabulary)  # fmt: skip
        found[f"top {k} and the mass of the others"] = bytes_per_token(k, vocabulary), _of_top(top)
        found[f"sample of {k}"] = bytes_per_token(k, vocabulary), _of_sample(drawn)
    for name, (k, more) in DISTILLKIT.items():
        size = more + k * (vocabulary - 1).bit_length() / 8
        found[f"DistillKit, {name}"] = size, _renormalized(top_k(said, k))
        found[f"DistillKit, {name}, evenly over the others"] = size, _evenly(top_k(said, k))
    return found


def _of_top(kept: TopK | Sampled) -> Loss:
    assert isinstance(kept, TopK)
    return lambda logits: top_k_divergence(logits, kept.ids, kept.log_probs, kept.tail, FORWARD)


def _of_sample(kept: TopK | Sampled) -> Loss:
    assert isinstance(kept, Sampled)
    return lambda logits: sampled_divergence(logits, kept.ids, kept.log_weights, kept.entropy, FORWARD)


def _renormalized(kept: TopK) -> Loss:
    logs = kept.log_probs.log_softmax(-1)
    return lambda logits: (logs.exp() * (logs - logits.log_softmax(-1).gather(-1, kept.ids))).sum(-1)


def _evenly(kept: TopK) -> Loss:
    assert kept.tail is not None
    each = kept.tail - log(kept.vocabulary - kept.ids.shape[1])  # pyright: ignore[reportOptionalOperand]

    def loss(logits: Tensor) -> Tensor:
        logs = logits.log_softmax(-1)
        whole = each[:, None].expand_as(logs).scatter(-1, kept.ids, kept.log_probs)
        return (whole.exp() * (whole - logs)).sum(-1)

    return loss


def main() -> None:
    teacher_folder, student_folder, windows = sys.argv[1:4]
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 4
    with open(windows) as file:
        ids = torch.tensor([json.loads(line)["input_ids"] for line, _ in zip(file, range(count), strict=False)])
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with torch.no_grad():
        said = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)

    def gradient(loss: Loss) -> Tensor:
        parts = torch.autograd.grad(loss(logits).mean(), parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    exact = gradient(lambda logits: divergence(logits, said, FORWARD))
    length = _product(exact, exact) ** 0.5
    for name, (size, loss) in signals(said).items():
        found = gradient(loss)
        own = _product(found, found) ** 0.5
        row = {"signal": name, "bytes": size, "cosine": round(_product(exact, found) / (length * own), 4),
               "norm": round(own / length, 3)}  # fmt: skip
        print(json.dumps(row), flush=True)


def _product(left: Tensor, right: Tensor) -> float:
    """Of two long vectors: in float32 the sum would be off by a hundredth."""
    pieces = zip(left.split(1 << 24), right.split(1 << 24), strict=True)
    return sum(float(a.double() @ b.double()) for a, b in pieces)


if __name__ == "__main__":
    main()
