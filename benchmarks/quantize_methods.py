"""What each way to quantize costs a model: bits per weight, divergence on held-out texts, time and memory.

    python benchmarks/quantize_peers/texts.py MODEL SHAKESPEARE TEXTS     # once
    python benchmarks/quantize_methods.py MODEL TEXTS [--llmcompressor PYTHON] [--gptqmodel PYTHON] [--autoround PYTHON]
        [--only NAME,NAME] [--seed 0] [--folder bench-methods] --json RESULTS

Each row is a command line of wtool, a peer's AWQ, or auto-round with 50 steps of 4 windows, as our rows of batch 4
have. The results are added to after each row; rows that they have are skipped, so a stopped run goes on by the same
command. Models are opened by wtool in float32, in whatever format they are, and their next-token distributions compared
with the full model's on the windows that benchmarks/quantize.py takes. Bits are of the blocks' linears, with scales,
zeros and indices; bytes are of all weight files. All rows have 32 x 512 calibration tokens and, but for GGUF's own
types, groups of 64.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quantize import PEERS, measure, surroundings
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

sys.path.append(str(PEERS))
from evaluate import (  # pyright: ignore[reportMissingImports]
    held_out_windows,
    hidden_states,
    looked_at,
    reference_states,
)

from wtool.checkpoint import open_checkpoint
from wtool.loading import load_model

CALIBRATED = "--calib {ids} --samples 32 --seqlen 512"
ROWS = {
    f"{method}-{bits}": f"--method {method} --bits {bits} --group-size 64 " + (CALIBRATED if method != "rtn" else "")
    for bits in (4, 3)
    for method in ("rtn", "gptq", "gptaq", "awq", "awq+gptq", "signround")
}
ROWS |= {
    f"{name}-{bits}": f"{flags} --bits {bits} --group-size 64"
    for bits in (4, 3)
    for name, flags in {
        "gptq-asymmetric": f"--method gptq --asymmetric {CALIBRATED}",
        "signround-batch-4": f"--method signround --batch 4 {CALIBRATED}",
        "signround-asymmetric-batch-4": f"--method signround --batch 4 --asymmetric {CALIBRATED}",
        "awq+signround-symmetric-batch-4": f"--method awq+signround --symmetric --batch 4 {CALIBRATED}",
        "awq+signround-batch-4": f"--method awq+signround --batch 4 {CALIBRATED}",
        "awq-symmetric": f"--method awq --symmetric {CALIBRATED}",
        "awq+gptq-symmetric": f"--method awq+gptq --symmetric {CALIBRATED}",
        "rotate+rtn": "--method rtn --rotate",
        "rotate+gptq": f"--method gptq --rotate {CALIBRATED}",
        "rotate+awq+gptq-symmetric": f"--method awq+gptq --symmetric --rotate {CALIBRATED}",
        "rotate+signround-batch-4": f"--method signround --batch 4 --rotate {CALIBRATED}",
    }.items()
}
LEARNED = f"--bits 2 --group-size 64 --batch 4 {CALIBRATED}"
ROWS |= {
    "signround-batch-4-2": f"--method signround {LEARNED}",
    "awq+signround-symmetric-batch-4-2": f"--method awq+signround --symmetric {LEARNED}",
}
ROWS |= {f"gptq-{bits}": f"--method gptq --bits {bits} --group-size 64 {CALIBRATED}" for bits in ("3.5", "4.0")}
ROWS |= {
    f"rotate+gptq-{bits}": f"--method gptq --rotate --bits {bits} --group-size 64 {CALIBRATED}"
    for bits in ("3.5", "4.0")
}
ROWS |= {f"rtn-{bits}": f"--method rtn --bits {bits} --group-size 64 {CALIBRATED}" for bits in ("3.5", "4.0")}
ROWS |= {
    f"awq+gptq-symmetric-{bits}": f"--method awq+gptq --symmetric --bits {bits} --group-size 64 {CALIBRATED}"
    for bits in ("3.5", "4.0")
}
ROWS |= {kind: f"--format gguf --type {kind}" for kind in ("Q4_K_M", "Q3_K_M")}
ROWS |= {f"{kind}-importances": f"--format gguf --type {kind} --stats {{stats}}" for kind in ("Q4_K_M", "Q3_K_M")}
PEER_ROWS = {
    "llmcompressor-awq-4": ("llmcompressor", "run_llmcompressor.py {model} {out} {ids} 4 64 auto awq"),
    "gptqmodel-awq-4": ("gptqmodel", "run_gptqmodel.py {model} {out} {ids} 4 64 bfloat16 awq"),
}
PEER_ROWS |= {
    f"autoround-{bits}": ("autoround", f"run_autoround.py {{model}} {{out}} {{ids}} {bits} 64 50 4")
    for bits in (4, 3, 2)
}
GGUF_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")


def commands(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The rows that were asked for, and what makes them."""
    places = {
        "model": arguments.model,
        "ids": arguments.texts / f"calib-s{arguments.seed}.jsonl",
        "stats": arguments.folder / "stats",
    }
    wanted = None if arguments.only is None else arguments.only.split(",")
    if wanted and (unknown := set(wanted) - ROWS.keys() - PEER_ROWS.keys()):
        raise SystemExit(f"--only: no row {', '.join(sorted(unknown))}; there are {', '.join([*ROWS, *PEER_ROWS])}")
    for name, flags in ROWS.items():
        if wanted is None or name in wanted:
            command = f"-m wtool quantize {{model}} {flags} -o {{out}} --json"
            yield name, [sys.executable, *command.format(**places, out=arguments.folder / name).split()]
    for name, (peer, command) in PEER_ROWS.items():
        python = getattr(arguments, peer)
        if python and (wanted is None or name in wanted):
            script, *rest = command.format(**places, out=arguments.folder / name).split()
            yield name, [python, str(PEERS / script), *rest]


def gather_statistics(arguments: argparse.Namespace) -> None:
    """The importances for GGUF, once."""
    ids, stats = arguments.texts / f"calib-s{arguments.seed}.jsonl", arguments.folder / "stats"
    if not stats.exists():
        command = f"-m wtool calibrate {arguments.model} {CALIBRATED.format(ids=ids)} -o {stats} --quiet"
        measure([sys.executable, *command.split()], arguments.folder / "stats.log")


def linear_bits(folder: Path, weights: int) -> float:
    """Bits of a weight of the blocks' linears, all that belongs to them counted."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in sorted(file.keys()) if "_proj." in name]
            total += sum(file.get_tensor(name).nbytes for name in names)
    for path in folder.glob("*.gguf"):
        from gguf import GGUFReader

        tensors = [each for each in GGUFReader(path).tensors if GGUF_LINEAR.fullmatch(each.name)]
        total += sum(int(each.n_bytes) for each in tensors)
    return total * 8 / weights


class Judge:
    """Compares models with the full one."""

    def __init__(self, model: Path, texts: Path, folder: Path):
        self.full = load_model(open_checkpoint(str(model)), dtype="F32")
        self.windows = held_out_windows(model, texts / "held")
        self.states = reference_states(self.full, self.windows, folder / "reference")
        self.weights = sum(p.numel() for name, p in self.full.named_parameters() if "_proj." in name)  # in blocks

    def divergence(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """{text: {"kl": nats a token, "ppl": ...}}"""
        return {text: self._on(model, ids, self.states[text]) for text, ids in self.windows.items()}

    def _on(self, model: PreTrainedModel, ids: Tensor, states: Tensor) -> dict[str, float]:
        kl, loss, places = 0.0, 0.0, looked_at(self.full)
        for row, full in zip(ids, states, strict=True):
            exact = self._logs(self.full, full[places])
            ours = self._logs(model, hidden_states(model, row)[places])
            following = row[1:][places, None]
            loss -= ours[: len(following)].gather(1, following).mean().item()
            kl += exact.exp().mul_(exact.sub_(ours)).sum(1).mean().item()
        return {"kl": kl / len(ids), "ppl": float(torch.tensor(loss / len(ids)).exp())}

    def _logs(self, model: PreTrainedModel, states: Tensor) -> Tensor:
        head: nn.Module = model.get_submodule("lm_head")  # of the full model and of a rotated one it is not the same
        return log_softmax(head(states), dim=-1)


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'':24}{'bits':>7}{'MB':>7}{'KL':>8}{'wall s':>8}{'peak MB':>9}   KL on each text")
    for name, row in rows.items():
        each = {text: found["kl"] for text, found in row["quality"].items()}
        line = f"{row['bits']:7.2f}{row['bytes'] / 1e6:7.1f}{sum(each.values()) / len(each):8.3f}"
        line += f"{row['usage']['seconds']:8.1f}{row['usage']['peak_anonymous_bytes'] / 1e6:9.0f}"
        print(f"{name:24}{line}   " + "  ".join(f"{text} {kl:.3f}" for text, kl in each.items()))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help="what quantize_peers/texts.py wrote")
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--autoround", metavar="PYTHON")
    parser.add_argument("--only", help="some of the rows alone")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--folder", type=Path, default=Path("bench-methods"), help="for outputs and logs")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {**surroundings([]), "rows": {}}
    judge = Judge(arguments.model, arguments.texts, arguments.folder)
    for name, command in commands(arguments):
        if name in found["rows"]:
            continue
        if "importances" in name:
            gather_statistics(arguments)
        out = arguments.folder / name
        shutil.rmtree(out, ignore_errors=True)
        usage = measure(command, arguments.folder / f"{name}.log")
        made = next(out.rglob("config.json"), out / "one.gguf").parent  # auto-round's is in a folder of its own
        quality = judge.divergence(load_model(open_checkpoint(str(made)), dtype="F32"))
        nbytes = sum(path.stat().st_size for kind in ("*.safetensors", "*.gguf") for path in made.glob(kind))
        bits = linear_bits(made, judge.weights)
        found["rows"][name] = {"bits": bits, "bytes": nbytes, "usage": asdict(usage), "quality": quality}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        print_table({name: found["rows"][name]})
        shutil.rmtree(out)
    print_table(found["rows"])


if __name__ == "__main__":
    main()
