"""llm-compressor's one-shot sparsity with the settings of its documentation: block 128, damping 0.01.

    python run_llmcompressor.py MODEL OUT IDS.jsonl METHOD AMOUNT [DTYPE=auto] [PIPELINE=sequential]

METHOD is wanda or sparsegpt; AMOUNT is a share of the weights to drop or 2:4. Windows are run one by one in the order
of the file; with the pipeline `basic` all layers see the whole model's inputs, not those that pruning leaves. All
linears but the output layer are pruned. Writes dense safetensors with zeros, in DTYPE. Needs llmcompressor 0.14.0.1 in
an environment of its own.
"""
# pyright: reportMissingImports=false

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "quantize_peers"))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from figures import calibration_rows, memory, report, stop_after_imports
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
model_folder, out, ids, method, amount = sys.argv[1:6]
dtype, pipeline = [*sys.argv[6:], *("auto", "sequential")[len(sys.argv) - 6 :]]
torch.set_num_threads(int(os.environ.get("THREADS", "2")))

rows = calibration_rows(ids)
pattern = ":" in amount
wish = {
    "sparsity": 0.5 if pattern else float(amount),  # 2:4 is all that is asked for here
    "mask_structure": amount if pattern else "0:0",
    "targets": ["Linear"],
    "ignore": ["re:.*lm_head"],
}
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
loaded = time.perf_counter()
recipe = WandaPruningModifier(**wish)
if method == "sparsegpt":
    recipe = SparseGPTModifier(block_size=128, dampening_frac=0.01, **wish)
oneshot(
    model=model,
    dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
    recipe=recipe,
    max_seq_length=max(map(len, rows)),
    num_calibration_samples=len(rows),
    batch_size=1,
    pipeline=pipeline,
    shuffle_calibration_samples=False,  # an unseeded shuffle makes every run differ
)
pruned = time.perf_counter()
model.save_pretrained(out, save_compressed=False)
AutoTokenizer.from_pretrained(model_folder).save_pretrained(out)
saved = time.perf_counter()
report(
    after_imports=after_imports,
    load_seconds=loaded - start,
    prune_seconds=pruned - loaded,
    save_seconds=saved - pruned,
)
