"""GGUF files of a model, and what wtool makes of a text with them; to be run in wtool's environment.

    python benchmarks/interop/gguf_make.py MODEL TEXT FOLDER TYPE...

Writes FOLDER/TYPE for each type, and FOLDER/expected.json: the tokens of the text by the model's own tokenizer, and
each file's perplexity on them by wtool, which decodes the file and computes in float32.
"""

import json
import subprocess
import sys
from pathlib import Path

from wtool.checkpoint import open_checkpoint
from wtool.loading import load_tokenizer

TOKENS, WINDOW = 2048, 512  # scored, and seen at once
CHARACTERS = 20_000  # of the text that are turned into tokens by both


def main() -> None:
    model, text, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(exist_ok=True)
    perplexities: dict[str, float] = {}
    for kind in sys.argv[4:]:
        out = folder / kind
        wtool("quantize", model, "--format", "gguf", "--type", kind, "-o", str(out))
        limits = ["--limit-tokens", str(TOKENS), "--window", str(WINDOW), "--stride", str(WINDOW)]
        told = json.loads(wtool("eval", str(out), "--text", str(text), *limits, "--json"))
        perplexities[str(next(out.glob("*.gguf")))] = told["texts"][0]["perplexity"]
    sample = text.read_text()[:CHARACTERS]
    samples = [sample, "Grüße, 42 naïve cafés\n\n\tdef f(x):  return x**2  # 1234567 🙂 日本語", "  two  spaces ", ""]
    tokenizer = load_tokenizer(open_checkpoint(model))
    texts = [[each, tokenizer(each)["input_ids"]] for each in samples]
    expected = {"window": WINDOW, "tokens": TOKENS, "texts": texts, "perplexities": perplexities}
    (folder / "expected.json").write_text(json.dumps(expected))


def wtool(*arguments: str) -> str:
    command = [sys.executable, "-m", "wtool", *arguments, "--quiet"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
