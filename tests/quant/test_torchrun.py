"""GPTQ in two processes: what one process gives, up to the order of the sums; and one speaks for both."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import contents
from ranked import start
from safetensors.torch import load_file
from tiny_models import llama, saved
from transformers import MixtralConfig, MixtralForCausalLM

from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.writer import MANIFEST, work_folder


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    calibration = ["--calib", str(text), "--samples", "12", "--seqlen", "64", "--batch-tokens", "128"]
    return ["quantize", str(model), "-g", "32", *calibration, "-o", str(out), *more]


def in_two(command: list[str], said: Path, fault: str = "none") -> list[int | None]:
    processes = start(command, said, fault=fault)
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes]


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_bytes())


def assert_alike(two: Path, one: Path, share: float) -> None:
    """The same layers, errors and files; of the codes all but a few alike."""
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    made, expected = open_checkpoint(str(two)), open_checkpoint(str(one))
    moved = total = 0
    for name in expected.tensors:
        difference = made.read(name) != expected.read(name)
        moved, total = moved + int(difference.sum()), total + difference.numel()
    assert moved <= share * total, f"{moved} of {total} weights differ"
    for layer, told in manifest(one)["report"].items():
        ours = manifest(two)["report"][layer]
        assert ours["tokens"] == told["tokens"]
        assert ours.get("output_error", 0) == pytest.approx(told.get("output_error", 0), rel=0.01)


def test_torchrun_gives_what_one_process_gives(model: Path, text: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*torchrun, "-m", "wtool", *command(model, text, tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("21 linear layers to") == 1  # the first process speaks
    assert run(command(model, text, tmp_path / "one")) == 0
    assert_alike(tmp_path / "two", tmp_path / "one", 0.001)
    assert manifest(tmp_path / "two")["recipe"]["processes"] == 2


@pytest.mark.parametrize("more", [["--asymmetric"], ["-m", "gptaq"], ["--no-sequential", "--format", "gptq"]])
def test_every_way_and_grid(model: Path, text: Path, tmp_path: Path, more: list[str]) -> None:
    assert in_two(command(model, text, tmp_path / "two", *more), tmp_path / "said") == [0, 0]
    assert run(command(model, text, tmp_path / "one", *more)) == 0
    assert_alike(tmp_path / "two", tmp_path / "one", 0.001)


def test_an_expert_that_only_one_process_saw_tokens_for(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=1
    )
    model = saved(MixtralForCausalLM(config).eval(), tmp_path / "mixtral")
    few = ["--samples", "4", "--seqlen", "16", "--batch-tokens", "16"]
    for out, carry_out in ((tmp_path / "two", lambda c: in_two(c, tmp_path / "said")), (tmp_path / "one", run)):
        assert carry_out([*command(model, text, out), *few]) in (0, [0, 0]), (tmp_path / "said" / "err0").read_text()
    tokens = [told["tokens"] for told in manifest(tmp_path / "one")["report"].values()]
    assert 0 in tokens and any(0 < count < 8 for count in tokens) and max(tokens) == 64
    assert_alike(tmp_path / "two", tmp_path / "one", 0.005)  # few tokens, so many codes that are nearly as good


def test_a_fault_of_one_process_is_told_once_and_ends_all(model: Path, text: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert in_two(command(model, text, tmp_path / "out"), said, fault="fails") == [5, 5]
    assert (said / "err1").read_text() == "error: process 1: the third matrix is bad here\n"
    assert (said / "err0").read_text() == ""


def test_the_death_of_a_process_is_told_and_what_is_done_is_kept(model: Path, text: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert in_two(command(model, text, tmp_path / "out"), said, fault="dies") == [5, 9]
    error = (said / "err0").read_text()
    assert error.startswith("error: another process of this run is gone (") and error.count("\n") == 1
    assert in_two(command(model, text, tmp_path / "out"), said) == [0, 0]
    assert in_two(command(model, text, tmp_path / "straight"), said) == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_killed_run_goes_on_from_its_blocks_and_another_says_it_is_there(text: Path, tmp_path: Path) -> None:
    made = llama(num_hidden_layers=8, hidden_size=64, intermediate_size=96, initializer_range=0.1)
    model, said = saved(made, tmp_path / "model"), tmp_path / "said"
    out, straight = tmp_path / "out", tmp_path / "straight"
    assert in_two(command(model, text, straight), said) == [0, 0]
    processes = start(command(model, text, out), said)
    journal = work_folder(out) / "journal"
    while processes[0].is_alive() and not (journal.exists() and journal.read_bytes().count(b"\n") > 30):
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    assert not out.exists(), "it was through before it was killed"
    assert in_two(command(model, text, out), said) == [0, 0]
    assert " of it from the run before" in (said / "out0").read_text()
    assert contents(out) == contents(straight)
    assert in_two(command(model, text, out), said) == [0, 0]
    assert "there already" in (said / "out0").read_text()


def test_what_several_processes_cannot_do_is_refused_once(model: Path, text: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    for more, error in (
        (["--method", "rtn"], "a quantization without a walk is done by one process: start it without torchrun"),
        (["--samples", "2"], "2 processes for 1 batches of calibration text"),
        (["--bits", "7"], "bits is 7; there are 2, 3, 4, 5, 6, 8"),
    ):
        assert in_two([*command(model, text, tmp_path / "out"), *more], said) == [2, 2]
        assert error in (said / "err0").read_text()
        others = (said / "err1").read_text().splitlines()  # where gloo may tell of a connection that is gone
        assert not any(line.startswith("error") for line in others)


def test_the_sums_are_those_of_all_tokens(model: Path, text: Path, tmp_path: Path) -> None:
    """The scales and codes of the first layer come from a Gram matrix that only the order of sums tells apart."""
    assert in_two(command(model, text, tmp_path / "two", "-b", "2"), tmp_path / "said") == [0, 0]
    half = command(model, text, tmp_path / "half", "-b", "2", "--samples", "6")
    assert run(half) == 0 and run(command(model, text, tmp_path / "one", "-b", "2")) == 0
    two, one, less = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one", "half"))
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    assert torch.equal(two[name], one[name])
    assert not torch.equal(less[name], one[name])
