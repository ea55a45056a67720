"""kill -9 at random moments while a GGUF file is written; the same command then gives the bytes of an undisturbed run.

WTOOL_KILLS says how many kills (default 3).
"""

import os
import random
import time
from contextlib import suppress
from pathlib import Path

from killing import contents, start
from tiny_models import llama, saved

from wtool.writer import work_folder

KILLS = int(os.environ.get("WTOOL_KILLS", "3"))


def test_every_kill_is_survived(tmp_path: Path) -> None:
    made = llama(num_hidden_layers=6, hidden_size=128, intermediate_size=128)
    source = saved(made, tmp_path / "model")

    def command(out: Path) -> list[str]:
        return ["quantize", str(source), "--format", "gguf", "--type", "Q5_0", "-o", str(out)]

    start(command(tmp_path / "first")).join()  # the server starts with it
    begin = time.perf_counter()
    undisturbed = start(command(tmp_path / "straight"))
    undisturbed.join()
    seconds = time.perf_counter() - begin
    assert undisturbed.exitcode == 0
    expected = contents(tmp_path / "straight")
    chance = random.Random(0)
    resumed = 0
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        process = start(command(out))
        while number == 0 and process.is_alive() and _lines(work_folder(out) / "journal") < 4:
            time.sleep(0.002)  # the first is killed between tensors, for certain
        time.sleep(chance.uniform(0.1, 1) * seconds if number else 0)
        with suppress(ProcessLookupError):  # it may be through
            process.kill()
        process.join()
        resumed += _lines(work_folder(out) / "journal") > 1
        again = start(command(out))
        again.join()
        assert again.exitcode == 0
        assert contents(out) == expected
        assert not work_folder(out).exists()
    assert resumed > 0


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0
