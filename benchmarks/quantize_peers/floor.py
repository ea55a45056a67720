"""What no calibrated quantizer that feeds its own results onward can do without: two forwards and the Gram matrices.

    python floor.py MODEL OUT IDS.jsonl BITS GROUP

In float32, window by window: a forward of the full model with XᵀX of every distinct input of a linear, and another
forward. No column loop, no clip search, no file; OUT, BITS and GROUP are not used.
"""

import os
import sys
import time

import torch
from figures import calibration_rows, memory, report, stop_after_imports
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
torch.set_num_threads(int(os.environ.get("THREADS", "2")))


def add_gram(grams: dict[nn.Module, Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Add one input's XᵀX to its module's."""
    x = arguments[0].flatten(0, 1)
    grams.setdefault(module, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)


@torch.inference_mode()
def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    rows = torch.tensor(calibration_rows(sys.argv[3]))
    grams: dict[nn.Module, Tensor] = {}
    distinct = ("q_proj", "o_proj", "gate_proj", "down_proj")
    hooked = [module for name, module in model.named_modules() if name.endswith(distinct)]
    start = time.perf_counter()
    handles = [each.register_forward_pre_hook(lambda *arguments: add_gram(grams, *arguments)) for each in hooked]
    for row in rows:
        model.base_model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    first = time.perf_counter()
    for row in rows:
        model.base_model(input_ids=row[None], use_cache=False)
    report(after_imports=after_imports, grams_seconds=first - start, forward_seconds=time.perf_counter() - first)


main()
