"""auto-round: rounding learned by signed gradient descent, the mark of quality that no GPTQ reaches.

    python run_autoround.py MODEL OUT IDS.jsonl BITS GROUP [ITERATIONS=50 [BATCH=4]]

Writes gptq (v1) into a folder inside OUT; about half of its scales are negative. Needs auto-round 0.15.1.
"""
# pyright: reportMissingImports=false

import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from auto_round import AutoRound
from figures import calibration_rows, memory, report, stop_after_imports
from transformers import AutoTokenizer

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
model_folder, out, ids = sys.argv[1:4]
bits, group = int(sys.argv[4]), int(sys.argv[5])
iterations = int(sys.argv[6]) if len(sys.argv) > 6 else 50
batch = int(sys.argv[7]) if len(sys.argv) > 7 else 4
torch.set_num_threads(int(os.environ.get("THREADS", "2")))

tensors = [torch.tensor([row]) for row in calibration_rows(ids)]
start = time.perf_counter()
run = AutoRound(
    model_folder,
    AutoTokenizer.from_pretrained(model_folder),
    bits=bits,
    group_size=group,
    sym=True,
    iters=iterations,
    nsamples=len(tensors),
    seqlen=tensors[0].shape[1],
    dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tensors],
    batch_size=batch,
    device_map="cuda" if torch.cuda.is_available() else "cpu",
    low_gpu_mem_usage=False,
)
run.quantize_and_save(out, format="auto_gptq")
report(after_imports=after_imports, quantize_seconds=time.perf_counter() - start)
