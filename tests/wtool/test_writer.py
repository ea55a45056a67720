import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wtool.checkpoint.base import TensorInfo
from wtool.dtypes import dtype_name
from wtool.errors import DiskFull, OutputExists, UnfinishedWork, UsageError
from wtool.shards import plan_shards
from wtool.writer import MANIFEST, Writer, is_complete, work_folder

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "c": torch.randn(40, 2).half(),
}
INFOS = {name: TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def write_all(writer, names=TENSORS):
    for name in names:
        writer.write({name: TENSORS[name]})


def whole(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("max_bytes", [10**9, 100, 1])
def test_what_is_written_is_what_the_package_reads(tmp_path, max_bytes):
    shards = plan_shards(INFOS, max_bytes)
    with Writer(tmp_path / "out", shards, "x") as writer:
        write_all(writer, reversed(TENSORS))  # any order
        writer.commit({"note.txt": b"hello"})
    found = {}
    for shard in shards:
        found |= load_file(tmp_path / "out" / shard.filename)
        with safe_open(tmp_path / "out" / shard.filename, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert (tmp_path / "out" / "note.txt").read_bytes() == b"hello"
    assert not work_folder(tmp_path / "out").exists()
    if len(shards) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert index["metadata"]["total_size"] == sum(info.nbytes for info in INFOS.values())


def test_shards_hold_as_much_as_fits():
    infos = {str(i): TensorInfo("U8", (size,)) for i, size in enumerate([4, 4, 4, 20, 1])}
    shards = plan_shards(infos, 8)
    assert [list(shard.tensors) for shard in shards] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert shards[0].filename == "model-00001-of-00004.safetensors"


def test_nothing_has_the_name_before_it_is_whole(tmp_path):
    with Writer(tmp_path / "out", plan_shards(INFOS, 100), "x") as writer:
        write_all(writer, ["a", "b"])
    assert not (tmp_path / "out").exists()


def test_a_stopped_work_goes_on(tmp_path):
    shards = plan_shards(INFOS, 100)
    with Writer(tmp_path / "straight", shards, "x") as writer:
        write_all(writer)
        writer.commit({})
    with Writer(tmp_path / "out", shards, "x") as writer:
        writer.write({"a": TENSORS["a"]}, note={"told": 1})
    with Writer(tmp_path / "out", shards, "x") as writer:
        assert list(writer.done) == ["a"] and writer.notes == [{"told": 1}]
        write_all(writer, [name for name in TENSORS if name not in writer.done])
        writer.commit({})
    assert whole(tmp_path / "out") == whole(tmp_path / "straight")


def test_a_line_cut_short_and_bytes_that_changed_are_done_again(tmp_path):
    shards = plan_shards(INFOS, 10**9)
    out = tmp_path / "out"
    with Writer(out, shards, "x") as writer:
        write_all(writer, ["a", "b", "c"])
    journal = work_folder(out) / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # the line of c, cut
    with (work_folder(out) / "output" / shards[0].filename).open("r+b") as file:
        file.seek(shards[0].offsets["a"])
        file.write(b"\xff")  # a lost page
    for _ in range(2):  # the second time, the journal tells of a twice
        with Writer(out, shards, "x") as writer:
            assert set(writer.done) >= {"b"} and "c" not in writer.done
            if "a" not in writer.done:
                writer.write({"a": TENSORS["a"]})
    with Writer(out, shards, "x") as writer:
        write_all(writer, [name for name in TENSORS if name not in writer.done])
        writer.commit({})
    assert torch.equal(load_file(out / "model.safetensors")["a"], TENSORS["a"])


def test_other_work_is_not_mixed_in(tmp_path):
    shards = plan_shards(INFOS, 100)
    with Writer(tmp_path / "out", shards, "x") as writer:
        write_all(writer, ["a"])
    with pytest.raises(UnfinishedWork, match="unfinished work of another recipe"):
        Writer(tmp_path / "out", shards, "y")
    with Writer(tmp_path / "out", shards, "y", force=True) as writer:
        assert not writer.done


def test_two_at_once_are_told(tmp_path):
    shards = plan_shards(INFOS, 100)
    with Writer(tmp_path / "out", shards, "x"):
        with pytest.raises(UnfinishedWork, match="another wtool is writing it now"):
            Writer(tmp_path / "out", shards, "x")


def test_what_is_there_stays_without_force(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputExists, match="--force replaces it"):
        Writer(tmp_path / "out", plan_shards(INFOS, 100), "x")
    with Writer(tmp_path / "out", plan_shards(INFOS, 10**9), "x", force=True) as writer:
        write_all(writer)
        assert (tmp_path / "out" / "mine").exists()  # until the new one is whole
        writer.commit({})
    assert sorted(whole(tmp_path / "out")) == ["model.safetensors"]


def test_a_full_disk_is_one_line_and_the_work_goes_on(tmp_path, monkeypatch):
    shards = plan_shards(INFOS, 100)
    writer = Writer(tmp_path / "out", shards, "x")
    write_all(writer, ["a"])
    real = os.pwrite

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with writer, pytest.raises(DiskFull, match="no room left on the disk; what is done is kept"):
        write_all(writer, ["c"])
    monkeypatch.setattr(os, "pwrite", real)
    with Writer(tmp_path / "out", shards, "x") as writer:
        assert list(writer.done) == ["a"]


def test_room_is_looked_at_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskFull, match="needs .* bytes more, the disk has 10 free"):
        Writer(tmp_path / "out", plan_shards(INFOS, 100), "x")


def test_a_stop_at_the_very_end_is_told_as_done(tmp_path):
    out = tmp_path / "out"
    with Writer(out, plan_shards(INFOS, 10**9), "x") as writer:
        write_all(writer)
        writer.commit({MANIFEST: b'{"fingerprint": "x"}'})
    work = work_folder(out)
    work.mkdir()
    (work / "journal").write_text('{"fingerprint": "x"}\n')  # the rename was done, the clearing away was not
    assert is_complete(out, "x") and not is_complete(out, "y")
    assert not work.exists()


def test_the_package_itself_would_write_the_same_tensors(tmp_path):
    save_file({name: tensor for name, tensor in TENSORS.items()}, tmp_path / "theirs.safetensors")
    with Writer(tmp_path / "out", plan_shards(INFOS, 10**9), "x") as writer:
        write_all(writer)
        writer.commit({})
    theirs, ours = load_file(tmp_path / "theirs.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(theirs[name], ours[name]) for name in TENSORS)


@pytest.mark.parametrize("address", ["s3://bucket/out", "memory://out", "abfs://box@account/a/b"])
def test_an_object_store_is_no_place_to_write(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (Path(address), Path(address).resolve()):
        with pytest.raises(UsageError, match=f"^{address.replace('//', '/')}: an address, not a folder; .* mount it"):
            Writer(out, plan_shards(INFOS, 10**9), "x")
    assert not list(tmp_path.iterdir())


def test_a_folder_may_be_called_like_a_store(tmp_path):
    (tmp_path / "s3:").mkdir()
    with Writer(tmp_path / "s3:" / "out", plan_shards(INFOS, 10**9), "x") as writer:
        write_all(writer)
        writer.commit({})
    found = load_file(tmp_path / "s3:" / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
