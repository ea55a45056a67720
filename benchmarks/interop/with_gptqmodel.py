"""Logits of checkpoints in GPTQModel 7.7, on the CPU; to be run in its own environment (see README.md).

    python benchmarks/interop/with_gptqmodel.py LOGITS_FOLDER CHECKPOINT...

Each is opened as GPTQModel opens it by itself, which on a CPU is in bfloat16, and again with its plainest kernel in
float16, turned to float32 before it computes, so that nothing but the reading of the file is compared.
"""

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it 7.7.0 does not start on two processors or fewer

import sys
import traceback
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file

TOKENS = (torch.arange(64) * 7 % 512).view(2, 32)


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    for checkpoint in map(Path, sys.argv[2:]):
        for way in ("own", "float32"):
            name = f"{checkpoint.name}.{way}"
            try:
                model = opened(checkpoint, way)
                with torch.inference_mode():
                    logits = model(TOKENS).logits
            except Exception as error:
                traceback.print_exc()
                print(f"RESULT {name}: does not run: {(str(error) or repr(error)).splitlines()[0]}")
                continue
            kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
            print(f"RESULT {name}: runs, {', '.join(sorted(kinds))}, {logits.dtype}")
            save_file({"logits": logits.float().contiguous()}, out / f"{name}.safetensors")


def opened(checkpoint: Path, way: str) -> torch.nn.Module:
    """A transformers model with GPTQModel's layers in it."""
    if way == "own":
        return GPTQModel.load(str(checkpoint), device="cpu").model
    plainest = BACKEND.AWQ_TORCH if checkpoint.name.startswith("awq") else BACKEND.GPTQ_TORCH
    return GPTQModel.load(str(checkpoint), device="cpu", backend=plainest, dtype=torch.float16).model.float()


if __name__ == "__main__":
    main()
