"""How far a runtime's logits are from those of wtool's own decoding, in float32.

    python benchmarks/interop/compare.py CHECKPOINTS_FOLDER LOGITS_FOLDER

A logit's difference is told as a share of the largest logit. What a type costs is shown beside it: the same model
with the weights, and all that is computed, in bfloat16.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from wtool.checkpoint import open_checkpoint
from wtool.loading import load_model, quiet

TOKENS = (torch.arange(64) * 7 % 512).view(2, 32)


def main() -> None:
    checkpoints, logits = map(Path, sys.argv[1:3])
    print(f"{'checkpoint, kernel':<40} {'largest difference':>20} {'of bfloat16 itself':>20} {'of quantizing':>15}")
    plain = own_logits(checkpoints / "model")
    for file in sorted(logits.glob("*.safetensors")):
        checkpoint = checkpoints / file.name.partition(".")[0]
        own = own_logits(checkpoint)
        theirs = load_file(file)["logits"]
        figures = [share(theirs, own), share(own_logits(checkpoint, "BF16"), own), share(plain, own)]
        print(f"{file.stem:<40} {figures[0]:>20.1e} {figures[1]:>20.1e} {figures[2]:>15.1e}")


def own_logits(checkpoint: Path, dtype: str = "F32") -> torch.Tensor:
    """Float32 [2, 32, vocabulary], computed in a type."""
    with quiet(), torch.inference_mode():
        return load_model(open_checkpoint(str(checkpoint)), dtype=dtype)(TOKENS).logits.float()


def share(logits: torch.Tensor, right: torch.Tensor) -> float:
    return float((logits - right).abs().max() / right.abs().max())


if __name__ == "__main__":
    main()
