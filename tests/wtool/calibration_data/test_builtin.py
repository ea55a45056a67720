"""The text that Python carries: enough of it, without repeats, without what the demo measures on, always the same."""

import inspect
import os
import statistics
import subprocess
import sys

from wtool.calibration_data.builtin import builtin, texts
from wtool.calibration_data.rows import Text
from wtool.demo.texts import DOMAINS, SHORTEST_OWN_PARAGRAPH, held_out_documents

FOUND = texts()
CHARACTERS_PER_TOKEN = 5  # more than a vocabulary of 50,000 makes of such text


def test_there_is_enough_for_128_windows_of_2048_tokens() -> None:
    characters = {kind: 0 for kind in ("manual", "prose", "code")}
    for name, text in FOUND.items():
        characters[name.partition("/")[0]] += len(text)
    assert sum(characters.values()) > 300_000 * CHARACTERS_PER_TOKEN
    assert characters["code"] < characters["manual"] + characters["prose"]
    assert len(FOUND) > 300


def test_it_is_what_python_says_elsewhere() -> None:
    prose = [name for name in FOUND if name.startswith("prose/")]
    code = [name for name in FOUND if name.startswith("code/")]
    assert "prose/statistics" in prose and "code/heapq" in code
    documented = inspect.getdoc(statistics.fmean)
    assert documented and documented in FOUND["prose/statistics"]
    assert "def fmean" not in FOUND["prose/statistics"]
    assert not {name.partition("/")[2] for name in prose} & {name.partition("/")[2] for name in code}


def test_no_text_is_there_twice() -> None:
    found = list(FOUND.values())
    assert len(set(found)) == len(found)


def test_what_the_demo_holds_out_is_held_out_here() -> None:
    held_out = {
        paragraph.strip()
        for domain in DOMAINS
        for text in held_out_documents(domain).values()
        for paragraph in text.split("\n\n")
        if len(paragraph.strip()) >= 2 * SHORTEST_OWN_PARAGRAPH
    }
    manual = "\n\n".join(text for name, text in FOUND.items() if name.startswith("manual/"))
    assert len(held_out) > 100
    assert not [paragraph for paragraph in held_out if paragraph in manual]
    assert not [name for name in FOUND if name.endswith(("/csv", "/queue", "/shelve", "/shlex", "/textwrap"))]


def test_another_process_finds_the_same() -> None:
    code = "from wtool.calibration_data.builtin import builtin; print(builtin().record['xxh3'])"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    rows = builtin()
    assert found.stdout.strip() == rows.record["xxh3"]
    first = rows.read(0)
    assert isinstance(first, Text) and first.where.startswith("Python's manual/")
