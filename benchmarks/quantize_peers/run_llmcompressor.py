"""llm-compressor with the settings of its documentation.

    python run_llmcompressor.py MODEL OUT IDS.jsonl BITS GROUP [DTYPE=auto] [METHOD=gptq]

gptq is symmetric, with damping 0.01, block 128 and static order; awq is asymmetric, with duo scaling.

Writes compressed-tensors (pack-quantized). Needs llmcompressor 0.14.0.1 in an environment of its own.
"""
# pyright: reportMissingImports=false, reportArgumentType=false

import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from figures import calibration_rows, memory, report, stop_after_imports
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
model_folder, out, ids = sys.argv[1:4]
bits, group = int(sys.argv[4]), int(sys.argv[5])
dtype, method = [*sys.argv[6:], *["auto", "gptq"][len(sys.argv) - 6 :]]
torch.set_num_threads(int(os.environ.get("THREADS", "2")))
if not torch.accelerator.is_available():  # its AWQ pins memory, which fails where no accelerator reads it
    IntermediatesCache.pin_memory = lambda *_, **__: None

rows = calibration_rows(ids)
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
loaded = time.perf_counter()
weights = QuantizationArgs(num_bits=bits, type="int", symmetric=method == "gptq", strategy="group", group_size=group)
which = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
recipes = {
    "gptq": lambda: GPTQModifier(**which, dampening_frac=0.01, block_size=128),
    "awq": lambda: [AWQModifier(duo_scaling=True), QuantizationModifier(**which)],
}
oneshot(
    model=model,
    dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
    recipe=recipes[method](),
    max_seq_length=max(map(len, rows)),
    num_calibration_samples=len(rows),
    shuffle_calibration_samples=False,  # an unseeded shuffle makes every run differ
)
quantized = time.perf_counter()
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_folder).save_pretrained(out)
saved = time.perf_counter()
report(
    after_imports=after_imports,
    load_seconds=loaded - start,
    quantize_seconds=quantized - loaded,
    save_seconds=saved - quantized,
)
