"""Logits of checkpoints in transformers, which opens compressed-tensors by the package of that name.

python benchmarks/interop/with_transformers.py LOGITS_FOLDER CHECKPOINT...
"""

import sys
from pathlib import Path

import torch
from compare import TOKENS
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    for checkpoint in map(Path, sys.argv[2:]):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.inference_mode():
            save_file({"logits": model(TOKENS).logits.contiguous()}, out / f"{checkpoint.name}.safetensors")


if __name__ == "__main__":
    main()
