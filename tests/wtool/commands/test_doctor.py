"""What doctor finds on this machine, and what it says of machines that are worse off."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from wtool import __version__
from wtool.cli import run
from wtool.commands.doctor import OPTIONAL, examine, judge

SOUND = {
    "required": {"torch": {"found": "2.13.0", "wanted": ">=2.11", "fits": True}},
    "torch_cuda": None,
    "torch_rocm": None,
    "devices": [],
    "disks": {place: {"path": "/x", "total": 10**12, "free": 10**11} for place in ("here", "hub_cache")},
    "memory": {"total": 10**10, "available": 9 * 10**9},
    "hub": {"endpoint": None, "offline": False, "token": True},
}
H100 = {"name": "NVIDIA H100", "memory": 80 << 30, "free": 79 << 30, "driver": "580.1"}


def changed(**changes):
    return SOUND | {key: SOUND[key] | value for key, value in changes.items()}


def test_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = run(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == (3 if any(remark["wrong"] for remark in facts["remarks"]) else 0)
    assert facts["wtool"] == __version__ and facts["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert facts["torch_cuda"] == torch.version.cuda
    assert facts["disks"]["here"]["total"] == shutil.disk_usage(tmp_path).total
    assert set(facts["optional"]) == set(OPTIONAL)
    assert facts["optional"]["gguf"]["found"]
    assert run(["doctor"]) == code
    assert "optional packages" in capsys.readouterr().out


def test_a_sound_machine_gives_no_remark():
    assert judge(SOUND) == []


@pytest.mark.parametrize(
    ("changes", "wrong", "text", "cure"),
    [
        (
            {"required": {"transformers": {"found": "4.57.0", "wanted": ">=5.17", "fits": False}}},
            True,
            "transformers 4.57.0 is installed, wtool needs transformers>=5.17",
            "pip install 'transformers>=5.17'",
        ),
        (
            {"required": {"rich": {"found": None, "wanted": ">=13.9", "fits": False}}},
            True,
            "rich is not",
            "pip install",
        ),
        ({"disks": {"here": {"path": "/d", "total": 10**12, "free": 10**9}}}, True, "/d: 1.0 GB free", "free some"),
        ({"disks": {"hub_cache": {"path": "/c", "total": 10**12, "free": 9}}}, True, "/c: 9 B free", "--low-disk"),
        ({"memory": {"available": 10**9}}, False, "1.0 GB of memory available", "--activations disk"),
        ({"hub": {"token": False}}, False, "no token for the Hub", "set HF_TOKEN"),
        ({"hub": {"offline": True}}, False, "HF_HUB_OFFLINE is set", "unset it"),
    ],
)
def test_what_is_wrong_is_told_with_its_cure(changes, wrong, text, cure):
    (remark,) = judge(changed(**changes))
    assert remark.wrong == wrong and text in remark.text and cure in remark.cure


def test_gpu_driver_and_build_are_held_against_each_other():
    assert judge(SOUND | {"torch_cuda": "12.8", "devices": [H100]}) == []
    (note,) = judge(SOUND | {"torch_cuda": "12.8"})
    assert not note.wrong and "there is no NVIDIA driver" in note.text
    (problem,) = judge(SOUND | {"devices": [H100]})
    assert problem.wrong and "CPU build" in problem.text


def test_the_driver_is_asked(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81000, 580.65.06'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (device,) = examine()["devices"]
    assert device == {
        "name": "NVIDIA H100 80GB HBM3",
        "memory": 81559 << 20,
        "free": 81000 << 20,
        "driver": "580.65.06",
    }
    program.write_text("#!/bin/sh\nexit 9\n")
    assert examine()["devices"] == []


def test_a_token_is_seen_and_not_shown(hub, monkeypatch, capsys):
    run(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["hub"]["token"] is False
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run(["doctor", "--json"])
    told = capsys.readouterr().out
    assert json.loads(told)["hub"]["token"] is True and "hf_secret" not in told


def test_it_is_quick():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "wtool", "doctor"], capture_output=True, text=True, check=False
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not imported & {"torch", "transformers", "datasets", "ray"}
