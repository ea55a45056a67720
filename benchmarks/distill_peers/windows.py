"""The windows of text that all distillations of the benchmark learn from, as rows of token ids.

    python windows.py MODEL DATA OUT.jsonl COUNT LENGTH

DATA is what `wtool distill --data` takes, MODEL has the tokenizer. Rows are {"input_ids": [...]} of LENGTH tokens each.
"""

import json
import sys
from pathlib import Path

from wtool.calibration_data import CalibrationSource
from wtool.calibration_data.for_model import windows_for
from wtool.checkpoint import open_checkpoint


def main() -> None:
    model, data, out = sys.argv[1:4]
    count, length = int(sys.argv[4]), int(sys.argv[5])
    found = windows_for(open_checkpoint(model), CalibrationSource((data,), count, length, 0)).unpadded()
    whole = [window.tolist() for window in found if len(window) == length]
    if len(whole) < count:
        raise SystemExit(f"{data}: gives {len(whole)} windows of {length} tokens, but {count} are needed")
    Path(out).write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in whole))


if __name__ == "__main__":
    main()
