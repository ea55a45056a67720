"""What llama.cpp makes of our GGUF files; to be run in its own environment (see README.md).

python benchmarks/interop/with_llamacpp.py FOLDER

FOLDER is what gguf_make.py wrote. Tokens must be the same; perplexities are over the same windows.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama  # pyright: ignore[reportMissingImports]


def main() -> None:
    folder = Path(sys.argv[1])
    expected = json.loads((folder / "expected.json").read_text())
    for path, ours in expected["perplexities"].items():
        model = Llama(path, n_ctx=expected["window"], n_batch=expected["window"], logits_all=True, verbose=False)
        same = [model.tokenize(text.encode(), special=True) == ids for text, ids in expected["texts"]]
        ids = expected["texts"][0][1][: expected["tokens"] + 1]
        theirs = perplexity(model, ids, expected["window"])
        print(
            f"RESULT {Path(path).name}: tokens the same in {sum(same)} of {len(same)} texts; "
            f"perplexity {theirs:.4f} in llama.cpp, {ours:.4f} in wtool ({theirs / ours - 1:+.3%})",
            flush=True,
        )


def perplexity(model: Llama, ids: list[int], window: int) -> float:
    """Of all tokens but the first; windows do not overlap, the last is moved back to end with the text."""
    total, fresh = 0.0, 1
    while fresh < len(ids):
        begin = max(0, min(fresh - 1, len(ids) - 1 - window))
        model.reset()
        model.eval(ids[begin : begin + window])
        logits = np.asarray(model.scores[: min(window, len(ids) - begin)], np.float64)
        for place in range(fresh, min(begin + window + 1, len(ids))):
            row = logits[place - 1 - begin]
            total += row.max() + math.log(np.exp(row - row.max()).sum()) - row[ids[place]]
        fresh = min(begin + window + 1, len(ids))
    return math.exp(total / (len(ids) - 1))


if __name__ == "__main__":
    main()
