"""What no pruner that feeds its own results onward can do without: two plain forwards over the calibration tokens.

    python forwards.py MODEL OUT IDS.jsonl [DTYPE=float32]

Window by window, without the output layer. OUT is not used.
"""
# pyright: reportMissingImports=false

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "quantize_peers"))

import torch
from figures import calibration_rows, memory, report, stop_after_imports
from transformers import AutoModelForCausalLM

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
torch.set_num_threads(int(os.environ.get("THREADS", "2")))

with torch.inference_mode():
    dtype = sys.argv[4] if len(sys.argv) > 4 else "float32"
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
    rows = torch.tensor(calibration_rows(sys.argv[3]))
    start = time.perf_counter()
    for _ in range(2):
        for row in rows:
            model.base_model(input_ids=row[None], use_cache=False)
    report(after_imports=after_imports, forward_seconds=time.perf_counter() - start)
