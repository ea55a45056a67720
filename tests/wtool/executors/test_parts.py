"""An output written in parts is that of one process, to the byte, whatever was begun before."""

import json
import multiprocessing
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from killing import contents
from safetensors.torch import save_file
from slow_plans import plan

from wtool.checkpoint.base import TensorInfo
from wtool.executors.local import run
from wtool.executors.parts import Part, parts_of, take_over, write_part
from wtool.plan import Plan, Step, Told
from wtool.writer import MANIFEST, Writer, work_folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> partial[Plan]:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        (folder / name).mkdir()
        tensors = {f"model.layers.{i}.w": torch.randn(16, 8, generator=generator) for i in range(5)}
        save_file(tensors, folder / name / "model.safetensors")
    return partial(plan, (str(folder / "a"), str(folder / "b")), 1024, 0.0)  # two tensors a file


def in_parts(plan: Plan, out: Path, skipped: int = 0) -> None:
    """Carry out a plan part by part; those that are skipped must be there."""

    def elsewhere(writer: Writer) -> None:
        for part in parts_of(plan)[skipped:]:
            write_part(plan, part, writer.work, writer.fingerprint, workers=2)
        for part in parts_of(plan):
            take_over(part, writer)

    run(plan, out, elsewhere=elsewhere)


def test_parts_are_the_files_with_their_steps(make: partial[Plan]) -> None:
    parts = parts_of(make())
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003" for i in (1, 2, 3)]
    assert [len(part.steps) for part in parts] == [2, 2, 1]
    assert [part.nbytes for part in parts] == [1024, 1024, 512]


def test_an_output_in_parts_is_that_of_one_process(make: partial[Plan], tmp_path: Path) -> None:
    run(make(), tmp_path / "one")
    in_parts(make(), tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "parts"]


def _three(*_: torch.Tensor) -> Told:
    return Told((torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)), {"layer": {"seen": 1}})


def test_a_step_over_the_border_of_two_files_is_done_in_both(make: partial[Plan], tmp_path: Path) -> None:
    of = make()
    info = TensorInfo("F32", (2,))
    step = Step(of.steps[0].reads, {"x": info, "y": info, "z": info}, _three)
    plan = replace(of, steps=(step,), max_shard_bytes=16)
    parts = parts_of(plan)
    assert [list(part.steps[0].outputs) for part in parts] == [["x", "y"], ["z"]]
    run(plan, tmp_path / "one")
    in_parts(plan, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "parts" / MANIFEST).read_bytes())["report"] == {"layer": {"seen": 1}}


def test_a_whole_part_is_kept_over_a_stop_and_not_done_again(make: partial[Plan], tmp_path: Path) -> None:
    run(make(), tmp_path / "one")
    out = tmp_path / "out"

    def stopped(writer: Writer) -> None:
        write_part(make(), parts_of(make())[0], writer.work, writer.fingerprint, workers=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make(), out, elsewhere=stopped)
    inode = next(work_folder(out).glob("parts/model-00001-of-00003/*.safetensors")).stat().st_ino
    in_parts(make(), out, skipped=1)
    assert contents(out) == contents(tmp_path / "one")
    assert (out / "model-00001-of-00003.safetensors").stat().st_ino == inode


def test_one_process_goes_on_with_parts_and_parts_with_what_one_process_did(
    make: partial[Plan], tmp_path: Path
) -> None:
    run(make(), tmp_path / "one")
    for name, first, second in (("a", run_some_parts, run), ("b", run_some_steps, in_parts)):
        with pytest.raises(KeyboardInterrupt):
            first(make(), tmp_path / name)
        second(make(), tmp_path / name)
        assert contents(tmp_path / name) == contents(tmp_path / "one")


def run_some_parts(plan: Plan, out: Path) -> None:
    def stopped(writer: Writer) -> None:
        for part in parts_of(plan)[:2]:
            write_part(plan, part, writer.work, writer.fingerprint, workers=1)
        take_over(parts_of(plan)[0], writer)
        raise KeyboardInterrupt

    run(plan, out, elsewhere=stopped)


def run_some_steps(plan: Plan, out: Path) -> None:
    def stop(*_: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    run(replace(plan, steps=(*plan.steps[:3], replace(plan.steps[3], function=stop), *plan.steps[4:])), out, workers=1)


def test_force_discards_the_parts_of_another_recipe(make: partial[Plan], tmp_path: Path) -> None:
    other, out = replace(make(), recipe={"merge": "another"}), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_some_parts(other, out)
    run(make(), out, force=True, elsewhere=partial(only_new, make()))
    run(make(), tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")


def only_new(plan: Plan, writer: Writer) -> None:
    assert not list(writer.work.glob("parts/*"))
    for part in parts_of(plan):
        write_part(plan, part, writer.work, writer.fingerprint, workers=1)
        take_over(part, writer)


def _hold(plan: Plan, part: Part, work: Path, fingerprint: str) -> None:
    with Writer(part.folder(work), [part.shard], fingerprint, force=True):
        (work / "held").touch()
        time.sleep(1)


def test_a_part_waits_for_a_process_that_has_it_still(make: partial[Plan], tmp_path: Path) -> None:
    plan, work = make(), tmp_path / "work"
    part = parts_of(plan)[0]
    work.mkdir()
    context = multiprocessing.get_context("forkserver")
    other = context.Process(target=_hold, args=(plan, part, work, "f"))
    other.start()
    while not (work / "held").exists():
        time.sleep(0.01)
    write_part(plan, part, work, "f", workers=1)
    assert (part.folder(work) / part.shard.filename).stat().st_size == part.shard.size
    other.join()
