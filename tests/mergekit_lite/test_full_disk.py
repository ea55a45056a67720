"""A disk that is really full: a file system of two megabytes in memory."""

import subprocess

import pytest
import torch
from safetensors.torch import save_file

from wtool.cli import run


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(
            f"no file system can be mounted here ({done.stderr.strip()}); test_writer.py has the same by a stub"
        )
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_it_is_told_before_the_start_and_in_the_middle_and_the_work_goes_on(small_disk, tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({f"w{i}": torch.randn(256, 512) for i in range(3)}, tmp_path / name / "model.safetensors")
    inputs = [str(tmp_path / name) for name in ("a", "b")]
    assert run(["merge", *inputs, "-o", str(tmp_path / "straight")]) == 0
    command = ["merge", *inputs, "-o", str(small_disk / "out")]
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_000_000))
    assert run(command) == 4
    assert "bytes more, the disk has" in capsys.readouterr().err
    monkeypatch.setattr("wtool.writer.Writer._check_room", lambda self: None)  # as if another had filled it since
    assert run([*command, "--workers", "1"]) == 4
    shown = capsys.readouterr().err
    assert "no room left on the disk; what is done is kept" in shown and shown.count("\n") == 1
    assert not (small_disk / "out").exists()
    filler.unlink()
    assert run(command) == 0
    assert "from the run before" in capsys.readouterr().out
    for path in (tmp_path / "straight").iterdir():
        assert (small_disk / "out" / path.name).read_bytes() == path.read_bytes()
