"""Runs mergekit's methods on tensors in a file: `python peers_mergekit.py CASES.json TENSORS OUT`, in an environment
that has mergekit 0.1.5. A black box beside ours: nothing of it is imported elsewhere."""

import json
import sys

from mergekit.merge_methods import merge_tensors
from safetensors.torch import load_file, save_file

cases, tensors, out = json.load(open(sys.argv[1])), load_file(sys.argv[2]), sys.argv[3]
results = {
    name: merge_tensors(
        [tensors[key] for key in case["inputs"]],
        case["method"],
        parameters=case["parameters"],
        base_index=case["base"],
    )
    for name, case in cases.items()
}
save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
