"""Files whose parts are written in any order: the bytes are where they belong, direct writes or not."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wtool import placed_file
from wtool.placed_file import PlacedFile, Placement

SIZE = 3_000_000
CUTS = [
    [0, SIZE],
    [0, 8, 4096, 70_000, 70_001, 200_000, 2_999_999, SIZE],
    [0, 4096, 4096 + 65536, 1_000_000, SIZE],
]


@pytest.fixture(params=["direct", "cached"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlacedFile]:
    monkeypatch.setattr(placed_file, "BUFFER", 1 << 17)
    monkeypatch.setattr(placed_file, "_local", threading.local())
    if request.param == "cached":
        monkeypatch.delattr(os, "O_DIRECT")
    elif not is_direct(tmp_path):
        pytest.skip("the temporary folder's file system knows no direct writes; those through the cache are tested")
    with ThreadPoolExecutor(2) as disk:
        file = PlacedFile(tmp_path / "file", SIZE, disk)
        yield file
        file.close()


def is_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "tried", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def put(file: PlacedFile, data: np.ndarray, position: int, step: int) -> None:
    placement = file.place(position, data.size)
    for begin in range(0, data.size, step):
        part = data[begin : begin + step]
        placement.room(part.size)[:] = part
    placement.end()
    placement.wait()


@pytest.mark.parametrize("step", [1000, 4096, 65_536, 100_001, 1 << 21])
@pytest.mark.parametrize("cuts", CUTS)
def test_bytes_are_where_they_belong(opened: PlacedFile, cuts: list[int], step: int, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    parts = list(zip(cuts, cuts[1:], strict=False))
    for begin, end in parts[::2] + parts[1::2]:
        put(opened, data[begin:end], begin, step)
    opened.sync()
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert opened.read(100, 70_000) == data[70_000:70_100].tobytes()


def test_threads_write_neighbours_that_share_pages(opened: PlacedFile, tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    cuts = [0, *sorted(np.random.default_rng(2).choice(SIZE, 19, replace=False).tolist()), SIZE]
    with ThreadPoolExecutor(4) as pool:
        parts = zip(cuts, cuts[1:], strict=False)
        list(pool.map(lambda part: put(opened, data[part[0] : part[1]], part[0], 10_007), parts))
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_an_error_of_the_disk_comes_out_and_the_buffers_are_free_again(
    opened: PlacedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.ones(1_000_000, dtype=np.uint8)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            put(opened, data, 0, 50_000)
    put(opened, data, 0, 50_000)
    assert (tmp_path / "file").read_bytes()[:1_000_000] == data.tobytes()


def begun(file: PlacedFile, data: np.ndarray, position: int) -> Placement:
    """Put, and not waited for."""
    placement = file.place(position, data.size)
    for begin in range(0, data.size, 100_000):
        part = data[begin : begin + 100_000]
        placement.room(part.size)[:] = part
    placement.end()
    return placement


def test_the_next_is_put_together_while_the_last_is_written(
    opened: PlacedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, pwrite = np.random.default_rng(3).integers(0, 256, SIZE, dtype=np.uint8), os.pwrite

    def slowly(*arguments: Any) -> int:
        time.sleep(0.01)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", slowly)
    cuts = [0, 250_000, 250_100, 1_000_001, SIZE]
    placements = [begun(opened, data[begin:end], begin) for begin, end in pairwise(cuts)]
    for placement in placements:
        placement.wait()
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_an_error_is_told_of_the_one_whose_it_is(
    opened: PlacedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, pwrite = np.ones(1_000_000, dtype=np.uint8), os.pwrite

    def failing(file: int, part: memoryview, position: int) -> int:
        if position < 1_000_000:
            raise OSError(28, "No space left on device")
        return pwrite(file, part, position)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OSError, match="No space left"):
        begun(opened, data, 0).wait()
    begun(opened, data, 1_000_000).wait()
    assert (tmp_path / "file").read_bytes()[1_000_000:2_000_000] == data.tobytes()
