"""mergekit's passthrough of the layers that wtool kept; it has no score of its own.

    python run_mergekit.py MODEL OUT PRUNED

PRUNED is a folder that `wtool prune --layers` wrote, whose manifest names the layers. Needs mergekit 0.1.5 in an
environment of its own.
"""
# pyright: reportMissingImports=false

import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "quantize_peers"))
os.environ["HF_HUB_OFFLINE"] = "1"

from figures import memory, report, stop_after_imports
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
model_folder, out, pruned = sys.argv[1:4]

manifest = json.loads((Path(pruned) / "wtool.json").read_text())
layers: list[int] = manifest["recipe"]["kept"]["layers"]
starts = [layer for layer in layers if layer - 1 not in layers]
ends = [layer + 1 for layer in layers if layer + 1 not in layers]
model = str(Path(model_folder).resolve())  # what has no slash is asked of the Hub
runs = [{"model": model, "layer_range": run} for run in zip(starts, ends, strict=True)]
slices = [{"sources": [run]} for run in runs]
start = time.perf_counter()
dtype = json.loads((Path(model_folder) / "config.json").read_text())["dtype"]
config = MergeConfiguration.model_validate({"slices": slices, "merge_method": "passthrough", "dtype": dtype})
run_merge(config, out, MergeOptions(copy_tokenizer=True))
report(after_imports=after_imports, merge_seconds=time.perf_counter() - start)
