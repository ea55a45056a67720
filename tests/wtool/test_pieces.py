"""Tensors that are made in pieces: the same whole, some of it, in any type, by a plan and by name."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite.methods.ties import ties
from wtool import pieces
from wtool.checkpoint import open_checkpoint
from wtool.checkpoint.base import TensorInfo
from wtool.errors import RuntimeProblem
from wtool.executors.local import run
from wtool.pieces import Pieces, pieces_of
from wtool.plan import Plan, Step, Told
from wtool.writer import checksum

FLOATS = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("size", [1, 7, 10, 64, 1 << 20])
@pytest.mark.parametrize("unit", [1, 10, 100])
def test_pieces_are_of_whole_units(size: int, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", size)
    exact = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    asked: list[tuple[int, int]] = []

    def fill(begin: int, out: Tensor) -> None:
        asked.append((begin, out.numel()))
        out.copy_(exact.view(-1)[begin : begin + out.numel()])

    made = Pieces(exact.shape, torch.bfloat16, fill, unit)
    assert torch.equal(made.whole(), exact.bfloat16())
    for begin, end in ((0, 200), (3, 4), (15, 120), (199, 200), (5, 5)):
        assert torch.equal(made.some(begin, end, torch.float32), exact.view(-1)[begin:end])
    assert all(begin % unit == 0 and count % unit == 0 and count <= max(size, unit) for begin, count in asked)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (4, 5)])
def test_of_any_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(pieces_of(tensor).whole(), tensor)
    assert pieces_of(tensor, torch.float16).whole().dtype == torch.float16


def test_a_method_is_pickled_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(ties)) is ties
    assert ties.__name__ == "ties" and "elect" in (ties.__doc__ or "")


def planned(folder: Path, tensors: dict[str, Tensor], function: Callable[..., object]) -> Plan:
    """A plan whose first output leaves the second one's floats on an odd byte."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    source = open_checkpoint(str(folder))
    infos = source.tensors
    steps = [Step(((0, name),), {name: infos[name]}, function, in_pieces=True) for name in infos]  # type: ignore[arg-type]
    first = Step((), {"a": TensorInfo("U8", (3,))}, lambda: torch.tensor([1, 2, 3], dtype=torch.uint8))
    return Plan((source,), (first, *steps), {}, {"test": 1})


def test_a_plan_writes_them_at_any_place_and_sums_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"x{i}": torch.randn(size, generator=generator).to(kind)
        for i, (size, kind) in enumerate((size, kind) for size in (1, 999, 40_001, 0) for kind in FLOATS)
    }
    told: list[str] = []

    def doubled(tensor: Tensor) -> Told:
        made = pieces_of(tensor + tensor)
        return Told((made,), lambda: told.append("when it is written") or {})

    plan = planned(tmp_path / "in", tensors, doubled)
    run(plan, tmp_path / "out", workers=2)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made["a"].tolist() == [1, 2, 3] and len(told) == len(tensors)
    assert all(torch.equal(made[name], tensor + tensor) for name, tensor in tensors.items())
    manifest = (tmp_path / "out" / "wtool.json").read_text()
    lines = "\n".join(f"{name} {checksum(tensors[name])}" for name in sorted(tensors))
    assert checksum(lines.encode()) in manifest
    assert all(checksum(made[name]) in manifest for name in tensors)


def test_where_a_number_is_not_finite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)

    def spoilt(tensor: Tensor) -> Pieces:
        def fill(begin: int, out: Tensor) -> None:
            out.zero_()
            if begin == 3000:
                out[45] = torch.inf

        return Pieces(tensor.shape, tensor.dtype, fill)

    plan = planned(tmp_path / "in", {"w": torch.zeros(5000)}, spoilt)
    with pytest.raises(RuntimeProblem, match="'w': the result is inf at element 3045"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(plan, tmp_path / "out", allow_nonfinite=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].isinf().nonzero().tolist() == [[3045]]
