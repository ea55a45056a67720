"""kill -9 at random moments of a pruning; the same command then gives the bytes of an undisturbed run.

WTOOL_KILLS says how many kills of each (default 3).
"""

import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from killing import contents, start
from safetensors.torch import load_file
from tiny_models import llama, saved

from wtool.writer import work_folder

KILLS = int(os.environ.get("WTOOL_KILLS", "3"))
PRUNINGS = {
    "wanda": ["-m", "wanda", "--sparsity", "0.5"],
    "sizes": ["--ffn", "160", "--kv-heads", "1", "--hidden", "96", "--layers", "5", "--depth-score", "angular"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = llama(num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    return saved(made.to(torch.bfloat16), tmp_path_factory.mktemp("models") / "llama")


def written(out: Path) -> int:
    """How many tensors a run that is under way has written."""
    with suppress(FileNotFoundError):
        return (work_folder(out) / "journal").read_bytes().count(b"\n")
    return 0


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_every_kill_is_survived(pruning: str, source: Path, text: Path, tmp_path: Path) -> None:
    chance = random.Random(pruning)

    def command(out: Path) -> list[str]:
        calibration = ["--calib", str(text), "--samples", "12", "--seqlen", "64"]
        return ["prune", str(source), *PRUNINGS[pruning], *calibration, "-o", str(out)]

    undisturbed = start(command(tmp_path / "straight"))
    undisturbed.join()
    assert undisturbed.exitcode == 0
    expected = contents(tmp_path / "straight")
    tensors = len(load_file(tmp_path / "straight" / "model.safetensors"))
    half_done = 0
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        process = start(command(out))
        moment = chance.uniform(number, number + 1) * tensors / KILLS  # what comes before leaves nothing behind
        while process.is_alive() and written(out) < moment:
            time.sleep(0.001)
        with suppress(ProcessLookupError):  # it may be through
            process.kill()
        process.join()
        half_done += not out.exists()
        again = start(command(out))
        again.join()
        assert again.exitcode == 0
        assert contents(out) == expected
        assert not work_folder(out).exists()
    assert half_done > 0
