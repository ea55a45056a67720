"""Runs mergekit's methods on tensors in a file: `python peers_mergekit.py CASES.json TENSORS OUT`, in an environment
that has mergekit 0.1.5. A black box beside ours: nothing of it is imported elsewhere. A case that may fail, and does,
is left out."""

import json
import sys

from mergekit.merge_methods import merge_tensors
from safetensors.torch import load_file, save_file

cases, tensors, out = json.load(open(sys.argv[1])), load_file(sys.argv[2]), sys.argv[3]
results = {}
for name, case in cases.items():
    try:
        results[name] = merge_tensors(
            [tensors[key] for key in case["inputs"]],
            case["method"],
            parameters=case["parameters"],
            base_index=case["base"],
        )
    except Exception:
        if not case.get("may_fail"):
            raise
save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
