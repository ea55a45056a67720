"""How much of a short training is left when its weights are stored in bfloat16: rounded at random, or to the nearest.

    python benchmarks/rounding.py TEACHER STUDENT TEXT [--steps 1,4,12] [--lr 1e-4] [--json RESULTS]

The student learns in float32 from its teacher (forward KL, AdamW, 2 x 512 tokens a step). After each number of steps it
is judged as it is, and with every weight rounded: KL from the teacher on 2 x 512 tokens of the same text that come
after all that it learns from. Plain transformers and torch; of wtool only the rounding.
"""

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from quantize import surroundings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wtool.rounding import stochastic

WINDOWS, LENGTH = 2, 512
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda weight: weight,
    "bfloat16, at random": lambda weight: stochastic(weight, torch.bfloat16, seed=0).float(),
    "bfloat16, nearest": lambda weight: weight.bfloat16().float(),
}


def logs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.float().log_softmax(-1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


@torch.no_grad()
def judged(student: PreTrainedModel, held: Tensor, teacher: Tensor) -> dict[str, float]:
    """The KL in each way of storing the weights."""
    found: dict[str, float] = {}
    for way, rounded in WAYS.items():
        stored = deepcopy(student)
        for weight in stored.parameters():
            weight.copy_(rounded(weight))
        found[way] = divergence(teacher, logs(stored, held)).item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", default="1,4,12")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    marks = [0, *map(int, given.steps.split(","))]
    teacher = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=torch.bfloat16).eval()
    student = AutoModelForCausalLM.from_pretrained(given.student, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(given.teacher)(given.text.read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    if len(windows) < (marks[-1] + 1) * WINDOWS:
        parser.error(f"{given.text}: has {len(windows)} windows of {LENGTH}, {(marks[-1] + 1) * WINDOWS} are needed")
    steps = windows[: (marks[-1] + 1) * WINDOWS].view(-1, WINDOWS, LENGTH)
    optimizer = torch.optim.AdamW(student.parameters(), lr=given.lr, weight_decay=0)
    with torch.no_grad():
        said = logs(teacher, steps[-1])
    found: dict[int, dict[str, float]] = {}
    for step, batch in enumerate(steps):
        if step in marks:
            found[step] = judged(student, steps[-1], said)
            print(step, *(f"{way} {kl:.4f}" for way, kl in found[step].items()), sep="  ", flush=True)
        if step < marks[-1]:
            with torch.no_grad():
                wanted = logs(teacher, batch)
            divergence(wanted, logs(student, batch)).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if given.json:
        names = [path.name for path in (given.teacher, given.student, given.text)]
        about = {**surroundings([]), "command": names, "torch": torch.__version__}
        given.json.write_text(json.dumps({"surroundings": about, "lr": given.lr, "kl": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
