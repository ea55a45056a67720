"""GPTQModel with its defaults.

    python run_gptqmodel.py MODEL OUT IDS.jsonl BITS GROUP [DTYPE=its own] [METHOD=gptq]

gptq is symmetric, with damping 0.05, no act-order and group-aware reordering, and written as gptq (v1); awq is
asymmetric, in AWQ's own "gemm" format. Needs GPTQModel 7.7.0 in an environment of its own.
"""
# pyright: reportMissingImports=false

import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with 2 cores or fewer it stops at once without this

import torch
from figures import calibration_rows, memory, report, stop_after_imports
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import AWQConfig
from transformers import AutoTokenizer

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
model_folder, out, ids = sys.argv[1:4]
bits, group = int(sys.argv[4]), int(sys.argv[5])
dtype, method = [*sys.argv[6:], *["", "gptq"][len(sys.argv) - 6 :]]
torch.set_num_threads(int(os.environ.get("THREADS", "2")))

rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration_rows(ids)]
given = {"dtype": getattr(torch, dtype)} if dtype else {}
configs = {
    "gptq": lambda: QuantizeConfig(bits=bits, group_size=group, sym=True, desc_act=False),
    "awq": lambda: AWQConfig(bits=bits, group_size=group, sym=False, format="gemm"),
}
start = time.perf_counter()
model = GPTQModel.load(model_folder, configs[method](), **given)
loaded = time.perf_counter()
model.quantize(rows, batch_size=1)
quantized = time.perf_counter()
model.save(out)
AutoTokenizer.from_pretrained(model_folder).save_pretrained(out)
saved = time.perf_counter()
report(
    after_imports=after_imports,
    load_seconds=loaded - start,
    quantize_seconds=quantized - loaded,
    save_seconds=saved - quantized,
)
