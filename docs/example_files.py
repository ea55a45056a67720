"""Puts here the files that the pages of this site work on: `python example_files.py [FOLDER]`.

base, a, b    the demo's models: a small llama, and experts fine-tuned from it on Python's manual (a) and on code (b)
text.jsonl    text to calibrate and train on
held-out.txt  text that none of the models was trained on
"""

import json
import shutil
import sys
from pathlib import Path

import wtool
from wtool.demo.texts import held_out_text, training_documents

MODELS = Path(wtool.__file__).parent / "demo" / "models"
NAMES = {"base": "base", "docs": "a", "code": "b"}


def make(folder: Path) -> None:
    for name, here in NAMES.items():
        shutil.copytree(MODELS / name, folder / here)
    documents = list(training_documents("docs").values())[:40]
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "held-out.txt").write_text(held_out_text("docs", 8000), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
