"""A plan on a cluster of two nodes: what one process writes, to the byte, whoever is killed on the way."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from killing import contents
from ray_nodes import ENVIRONMENT, Nodes, nodes
from safetensors.torch import save_file
from slow_plans import plan

from wtool.cli import run as wtool
from wtool.errors import Mismatch, MissingInput, RuntimeProblem, UsageError
from wtool.executors import local, ray
from wtool.executors.chosen import check
from wtool.executors.cluster import address_of, connected
from wtool.plan import Plan
from wtool.writer import PARTS, work_folder

SHARD = 3_000_000  # two tensors a file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        tensors = {f"model.layers.{i}.w.weight": torch.randn(512, 512, generator=generator) for i in range(16)}
        save_file(tensors, folder / name / "model.safetensors")
    return str(folder / "a"), str(folder / "b")


@pytest.fixture(scope="module")
def expected(models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    local.run(plan(models, SHARD, 0), out)
    return contents(out)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'wtool[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with nodes(tmp_path_factory.mktemp("nodes")) as started:
            yield started


def whole(out: Path) -> dict[str, int]:
    """The parts that are whole, and what tells each from a copy of it."""
    found = (work_folder(out) / PARTS).glob("model-*/*.safetensors")
    return {file.name: file.stat().st_ino for file in found}


def begun(out: Path) -> bool:
    """Whether some part is whole, and some other has a step done and is not."""
    journals = [journal.read_bytes().count(b"\n") for journal in (work_folder(out) / PARTS).glob(".*.wtool/journal")]
    return len(whole(out)) >= 2 and any(lines > 1 for lines in journals)


class Comes(threading.Thread):
    """Does something to a run as soon as it is half done, and notes the parts that were whole before."""

    def __init__(self, out: Path, strike: Callable[[], None]):
        super().__init__()
        self._out, self._strike = out, strike
        self.kept: dict[str, int] = {}

    def run(self) -> None:
        end = time.monotonic() + 120
        while not begun(self._out) and time.monotonic() < end:
            time.sleep(0.01)
        self.kept = whole(self._out)
        self._strike()


def same_files(out: Path, kept: dict[str, int]) -> bool:
    return bool(kept) and all((out / name).stat().st_ino == inode for name, inode in kept.items())


def command(models: tuple[str, str], out: Path, *more: str) -> list[str]:
    return ["merge", *models, "-w", "0.5", "--shard-size", str(SHARD), "-o", str(out), "-q", *more]


@pytest.mark.slow
def test_both_commands_write_on_a_cluster_what_they_write_here(
    cluster: Nodes, models: tuple[str, str], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ("--executor", f"ray:{cluster.address}")
    monkeypatch.chdir(Path(models[0]).parent)  # paths in a recipe start from here on every machine
    assert wtool(command(("a", "b"), tmp_path / "relative", *there)) == 0
    assert wtool(command(("a", "b"), tmp_path / "here")) == 0
    assert contents(tmp_path / "relative") == contents(tmp_path / "here")
    quantize = ["quantize", models[0], "--method", "rtn", "--shard-size", "300kB", "-q"]
    assert wtool([*quantize, "-o", str(tmp_path / "q"), *there]) == 0
    assert wtool([*quantize, "-o", str(tmp_path / "q-here")]) == 0
    assert contents(tmp_path / "q") == contents(tmp_path / "q-here")
    assert len(list((tmp_path / "q").glob("model-*"))) > 2


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(
    cluster: Nodes, models: tuple[str, str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "from functools import partial; from pathlib import Path; from slow_plans import plan\n"
        "from wtool.executors import ray\n"
        f"make = partial(plan, {models!r}, {SHARD}, 0.2)\n"
        f"ray.run(make, make(), Path({str(out)!r}), address={cluster.address!r})"
    )
    driver = subprocess.Popen([sys.executable, "-c", code])
    striking = Comes(out, driver.kill)
    striking.run()
    driver.wait()
    assert wtool(command(models, out, "--executor", f"ray:{cluster.address}")) == 0
    assert contents(out) == expected
    assert same_files(out, striking.kept)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "node"])
def test_what_is_lost_is_replaced_and_only_its_files_are_done_again(
    victim: str, cluster: Nodes, models: tuple[str, str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, make = tmp_path / "out", partial(plan, models, SHARD, 0.2)

    def strike() -> None:
        if victim == "node":
            cluster.kill(1)
        else:
            os.kill(cluster.workers("write_named")[0], 9)

    striking = Comes(out, strike)
    striking.start()
    ray.run(make, make(), out, address=cluster.address)
    striking.join()
    assert contents(out) == expected
    assert same_files(out, striking.kept)
    assert len(striking.kept) < len(make().shards)


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_error_of_the_command(
    models: tuple[str, str], cluster: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    tensors = {f"model.layers.{i}.w.weight": torch.randn(512, 512) for i in range(16)}
    tensors["model.layers.9.w.weight"][3, 4] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    there = ("--executor", f"ray:{cluster.address}")
    assert wtool(command((models[0], str(folder)), tmp_path / "out", *there)) == 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{folder}: tensor 'model.layers.9.w.weight' has inf at element {3 * 512 + 4}" in error


def test_a_worker_refuses_other_inputs(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make = pickle.dumps(partial(plan, models, SHARD, 0))
    fingerprint, name = plan(models, SHARD, 0).fingerprint(), "model-00001-of-00016"

    def write(fingerprint: str, work: Path) -> None:
        ray.write_named(name, fingerprint, make, str(work), str(tmp_path), 1, False)

    with pytest.raises(Mismatch, match=r"^\S+ has other inputs, or another version of wtool"):
        write(fingerprint[::-1], tmp_path)
    with pytest.raises(MissingInput, match="nowhere: is not on .*; all machines need the same folders"):
        write(fingerprint, tmp_path / "nowhere")
    number = next(i for i, shard in enumerate(plan(models, SHARD, 0).shards) if len(shard.tensors))
    name = Path(plan(models, SHARD, 0).shards[number].filename).stem
    write(fingerprint, tmp_path)
    assert len(list((tmp_path / PARTS / name).glob("*.safetensors"))) == 1


def test_executors_are_checked_before_work(models: tuple[str, str], tmp_path: Path) -> None:
    made = plan(models, SHARD, 0)
    assert address_of("ray") is None
    assert address_of("ray:head.example:6379") == "head.example:6379"
    for wrong in ("dask", "ray:", "ray:head"):
        with pytest.raises(UsageError, match="take local, ray, or ray:HOST:PORT"):
            check(wrong, made)
    walked = Plan((), (made.steps[0].__class__((), {}, None),), {}, {})
    with pytest.raises(UsageError, match="start it with torchrun"):
        check("ray", walked)


def test_a_cluster_that_is_not_there_is_told_in_one_line() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'wtool[ray]'")
    with pytest.raises(
        RuntimeProblem, match=r"the Ray cluster at 127\.0\.0\.1:9: cannot be reached: Connection refused"
    ):
        with connected("127.0.0.1:9"):
            pass
