"""optipfair's structured pruning: channels of the feed-forward blocks, or whole layers.

    python run_optipfair.py MODEL OUT IDS.jsonl KIND COUNT

KIND is `maw` (width, by weights alone), `hybrid` (width, weights with activation norms), `last` (depth, the last
layers go) or `importance` (depth, by 1 - cosine). COUNT is what is taken out: a share of the channels, or a number of
layers. Calculates in float32 and saves in the model's type. Needs optipfair 0.4.2 in an environment of its own.
"""
# pyright: reportMissingImports=false

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "quantize_peers"))
os.environ["HF_HUB_OFFLINE"] = "1"

import optipfair
import torch
from figures import calibration_rows, memory, report, stop_after_imports
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

after_imports = memory("VmRSS")
stop_after_imports(after_imports)
model_folder, out, ids, kind, count = sys.argv[1:6]
torch.set_num_threads(int(os.environ.get("THREADS", "2")))

rows = [torch.tensor([row]) for row in calibration_rows(ids)]
batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
loaded = time.perf_counter()
dropped: list[int] = []
match kind:
    case "maw" | "hybrid":
        text = batches if kind == "hybrid" else None
        model = optipfair.prune_model(
            model, neuron_selection_method="MAW", pruning_percentage=100 * float(count), dataloader=text
        )
    case "last":
        dropped = list(range(model.config.num_hidden_layers - int(count), model.config.num_hidden_layers))
        model = optipfair.prune_model_depth(model, num_layers_to_remove=int(count), layer_selection_method="last")
    case "importance":
        scores = optipfair.analyze_layer_importance(model, batches)
        dropped = sorted(sorted(scores, key=lambda layer: scores[layer])[: int(count)])
        model = optipfair.prune_model_depth(model, layer_indices=dropped)
    case _:
        raise SystemExit(f"no such kind: {kind}")
pruned = time.perf_counter()
model.to(AutoConfig.from_pretrained(model_folder).dtype).save_pretrained(out)
AutoTokenizer.from_pretrained(model_folder).save_pretrained(out)
saved = time.perf_counter()
report(
    after_imports=after_imports,
    load_seconds=loaded - start,
    prune_seconds=pruned - loaded,
    save_seconds=saved - pruned,
    dropped=str(dropped),
)
