"""FSDP (its second version) on two processes without a GPU gives what one process gives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distilled import manifest, weights

from wtool.cli import run

WORKER = Path(__file__).parents[1] / "sharded_worker.py"


def sharded(told: Path, command: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*launch, str(WORKER), str(told), *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_two_sharded_processes_are_as_one(teacher: Path, text: Path, tmp_path: Path) -> None:
    def command(out: Path, batch: int) -> list[str]:
        data = ["--data", str(text), "--seqlen", "32", "--samples", "25", "--held-out", "5", "--ce", "0.1"]
        steps = ["--steps", "4", "--batch", str(batch), "--accumulation", "2", "--lr", "3e-3", "--evaluate-every", "2"]
        return [
            "distill",
            str(teacher),
            "--student-layers",
            "2",
            *data,
            *steps,
            "--device",
            "cpu",
            "-o",
            str(out),
            "-q",
        ]

    one, two = tmp_path / "one", tmp_path / "two"
    sharded(tmp_path / "told.json", command(two, 2))
    assert run(command(one, 4)) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    whole = sum(tensor.numel() for tensor in weights(one).values())
    assert told["sharded"] and told["held"] <= 0.51 * whole
    assert manifest(two)["processes"] == 2
    for kind in ("training", "evaluation"):
        for ours, theirs in zip(manifest(two)[kind], manifest(one)[kind], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-4)
