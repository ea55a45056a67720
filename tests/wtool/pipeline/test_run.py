"""Pipelines as a user runs them, on small trained models."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer
from killing import contents

from wtool.cli import run

PIPELINE: dict[str, Any] = {
    "matrix": {"bits": [4, 3]},
    "stages": {
        "merged": {
            "merge": {"merge_method": "linear", "models": [{"model": "./docs"}, {"model": "./code"}]},
            "keep": False,
        },
        "small": {"quantize": {"model": "$merged", "method": "rtn", "bits": "$bits", "group_size": 32}},
        "score": {"eval": {"checkpoint": "$small", "reference": "./docs", "text": ["held.txt"], "window": 64}},
    },
}


def written(content: dict[str, Any], path: str = "p.yaml") -> str:
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def jobs_to_run(pipeline: str, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    capsys.readouterr()
    assert run(["run", pipeline, "-o", "out", "--dry-run", "--json", *flags]) == 0
    return told(capsys)["to_run"]


def test_a_pipeline_is_run_once_and_its_results_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = written(PIPELINE)
    assert run(["run", pipeline, "-o", "out", "--dry-run", "--json"]) == 0
    plan = told(capsys)
    assert not Path("out").exists() and plan["problems"] == []
    planned = {job["job"]: job for job in plan["jobs"]}
    assert run(["run", pipeline, "-o", "out", "--json"]) == 0
    captured = capsys.readouterr()
    assert "[5/5] score bits=3: done" in captured.err
    rows = json.loads(captured.out)["results"]
    assert [(row["stage"], row.get("bits"), row["status"]) for row in rows] == [
        ("merged", None, "done"),
        ("small", 4, "done"),
        ("small", 3, "done"),
    ]
    assert 0 < rows[1]["held KL"] < rows[2]["held KL"]  # a bit less is a bit worse
    assert run(["eval", "out/small/bits=4", "--text", "held.txt", "--window", "64", "--json"]) == 0
    assert told(capsys)["texts"][0]["perplexity"] == pytest.approx(rows[1]["held perplexity"])
    weights = Path("out/small/bits=4/model.safetensors").stat().st_size
    assert planned["small bits=4"]["bytes"] == pytest.approx(weights, rel=0.05)
    with open("out/results.csv", newline="") as file:
        assert [row["held KL"] for row in csv.DictReader(file)] == ["", *(str(row["held KL"]) for row in rows[1:])]
    assert not Path("out/merged").exists()  # `keep: false`, and nothing needs it any more
    assert jobs_to_run(pipeline, capsys) == []
    changed = PIPELINE | {"matrix": {"bits": [4, 2]}}
    assert jobs_to_run(written(changed), capsys) == ["merged", "small bits=2", "score bits=2"]
    os.utime("docs/model.safetensors")  # an input is another one
    assert len(jobs_to_run(written(PIPELINE), capsys)) == 5


def test_every_problem_is_told_before_anything_is_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = PIPELINE["stages"] | {
        "badly": {"quantize": {"model": "$merged", "bitz": 4}},
        "lost": {"prune": {"model": "$merged", "layers": 9}},
        "deaf": {"eval": {"checkpoint": "$merged", "text": ["hold.txt"]}},
        "odd": {"eval": {"checkpoint": "$merged", "text": ["held.txt"], "windw": 3}},
    }
    pipeline = written(PIPELINE | {"stages": stages})
    assert run(["run", pipeline, "-o", "out", "--dry-run", "--json"]) == 3
    problems = told(capsys)["problems"]
    for part in ("did you mean 'bits'?", "9", "hold.txt: no such text file", "did you mean 'window'?"):
        assert any(part in problem for problem in problems), (part, problems)
    assert len(problems) == 4
    assert run(["run", pipeline, "-o", "out"]) == 2
    assert "nothing was begun" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_failed_job_stops_only_what_needs_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(yaml.safe_dump(PIPELINE))
    content["stages"]["broken"] = {"quantize": {"model": "./bad", "method": "rtn", "group_size": 32}}
    content["stages"]["after_it"] = {"eval": {"checkpoint": "$broken", "text": ["held.txt"]}}
    _with_nan(here / "docs", here / "bad")
    pipeline = written(content)
    assert run(["run", pipeline, "-o", "out", "--json", "-j", "2"]) == 5
    output, error = capsys.readouterr()
    status = {(row["stage"], row.get("bits")): row for row in json.loads(output)["results"]}
    assert status["small", 4]["status"] == status["small", 3]["status"] == "done"
    assert "nan" in status["broken", None]["error"] and "'broken' is not there" in status["after_it", None]["error"]
    assert error.splitlines()[-1].startswith("error: 2 of 7 jobs failed or could not be begun; broken: ")
    assert jobs_to_run(pipeline, capsys) == ["broken", "after_it"]


def _with_nan(source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name].clone().fill_(torch.nan)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def test_only_what_a_stage_needs_is_run_and_done_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(yaml.safe_dump(PIPELINE))
    content["stages"]["merged"]["keep"] = True
    pipeline = written(content)
    assert jobs_to_run(pipeline, capsys, "--only", "small") == ["merged", "small bits=4", "small bits=3"]
    assert run(["run", pipeline, "-o", "out", "--only", "merged", "--quiet"]) == 0
    assert jobs_to_run(pipeline, capsys, "--only", "small") == ["small bits=4", "small bits=3"]
    assert jobs_to_run(pipeline, capsys, "--only", "merged") == []
    assert jobs_to_run(pipeline, capsys, "--redo", "merged", "--only", "merged") == ["merged"]
    assert run(["run", pipeline, "--only", "smal"]) == 2
    assert "did you mean 'small'?" in capsys.readouterr().err


def test_killed_twice_and_given_again_it_ends_with_the_same_bytes(here: Path) -> None:
    pipeline = written(PIPELINE)
    other = shutil.copytree(here, here.with_name(f"{here.name}-other"))
    command = [sys.executable, "-m", "wtool", "run", pipeline, "--quiet", "--keep", "-o", "out"]
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - begin
    for share in (0.3, 0.5):
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=other)
        time.sleep(share * whole)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=other)
    for made in ("merged", "small/bits=4", "small/bits=3"):
        assert contents(here / "out" / made) == contents(other / "out" / made)


def test_a_job_ends_with_the_pipeline_that_began_it(here: Path) -> None:
    pipeline = written(PIPELINE)
    parent = subprocess.Popen([sys.executable, "-m", "wtool", "run", pipeline, "-o", "out"], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task")
    found: list[int] = []
    while not found:
        assert parent.poll() is None
        time.sleep(0.01)
        found = [int(each) for task in children.iterdir() for each in (task / "children").read_text().split()]
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while any(map(_lives, found)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_lives, found))


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_jobs_are_run_on_a_cluster(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'wtool[ray]'")
    from ray_nodes import ENVIRONMENT, nodes

    pipeline = written(PIPELINE | {"options": {"workers": 1}})
    environment = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, "-m", "wtool", "run", pipeline, "--keep", "-j", "4", "-o"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with nodes(tmp_path_factory.mktemp("nodes")) as cluster:
            there = [*command, "there", "--executor", f"ray:{cluster.address}", "--json"]
            done = subprocess.run(there, check=True, stdout=subprocess.PIPE, env=environment)
    assert [row["status"] for row in json.loads(done.stdout)["results"]] == ["done"] * 3
    subprocess.run([*command, "here"], check=True, stdout=subprocess.DEVNULL)
    for made in ("merged", "small/bits=4", "small/bits=3"):
        weights = [(here / out / made / "model.safetensors").read_bytes() for out in ("here", "there")]
        assert weights[0] == weights[1]


def test_what_was_made_is_pushed_once(
    here: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    hub.writers["me"] = {"mine"}
    pipeline = written(
        {
            "matrix": {"bits": [4, 8]},
            "stages": {
                "small": {"quantize": {"model": "./docs", "method": "rtn", "bits": "$bits", "group_size": 32}},
                # the repository first: arguments without a name are told by their place, not by the file's order
                "shared": {"push": {"repository": "me/docs-${bits}bit", "folder": "$small"}},
            },
        }
    )
    assert run(["run", pipeline, "-o", "out", "--json"]) == 0
    rows = told(capsys)["results"]
    assert [row["status"] for row in rows if row["stage"] == "shared"] == ["done", "done"]
    for bits in (4, 8):
        assert run(["inspect", f"me/docs-{bits}bit", "--json"]) == 0
        assert told(capsys)["tensors"]
    assert jobs_to_run(pipeline, capsys) == []
