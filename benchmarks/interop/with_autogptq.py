"""Logits of checkpoints in AutoGPTQ 0.7.1, on the CPU in float32; to be run in its own environment (see README.md).

python benchmarks/interop/with_autogptq.py LOGITS_FOLDER CHECKPOINT...
"""

import sys
import traceback
from pathlib import Path

import auto_gptq.modeling._base as autogptq  # pyright: ignore[reportMissingImports]
import torch
from auto_gptq import AutoGPTQForCausalLM  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file

autogptq.MARLIN_AVAILABLE = False  # where it is there, 0.7.1 asks for the GPU that would run it
TOKENS = (torch.arange(64) * 7 % 512).view(2, 32)


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    for checkpoint in map(Path, sys.argv[2:]):
        try:
            model = AutoGPTQForCausalLM.from_quantized(
                str(checkpoint),
                device="cpu",
                torch_dtype=torch.float32,
                disable_exllama=True,  # these kernels need a GPU
                disable_exllamav2=True,
            )
            with torch.inference_mode():
                logits = model.model(input_ids=TOKENS).logits
        except Exception as error:
            traceback.print_exc()
            print(f"RESULT {checkpoint.name}: does not run: {(str(error) or repr(error)).splitlines()[0]}")
            continue
        kinds = {type(module).__module__.rpartition(".")[2] for module in model.modules() if hasattr(module, "qweight")}
        print(f"RESULT {checkpoint.name}: runs, {', '.join(sorted(kinds))}, {logits.dtype}")
        save_file({"logits": logits.float().contiguous()}, out / f"{checkpoint.name}.safetensors")


if __name__ == "__main__":
    main()
