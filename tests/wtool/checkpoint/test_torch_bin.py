"""torch files: every tensor reads as torch saved it, and no other pickle is ever run."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from wtool.checkpoint import open_checkpoint
from wtool.checkpoint.base import TensorInfo
from wtool.checkpoint.torch_bin import TorchFile
from wtool.errors import MalformedFile


def saved(path: Path, content: Any, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path: Path) -> str:
    """The one line a file is refused with."""
    with pytest.raises(MalformedFile) as caught:
        TorchFile(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_saved(tmp_path: Path, zipped: bool) -> None:
    whole = torch.randn(6, 8)
    state = {
        "plain": whole,
        "tied": whole,  # shares its storage
        "transposed": whole.t(),  # not contiguous
        "rows": whole[2:5],  # begins inside a storage
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(5, dtype=torch.float32).to(torch.bfloat16),
        "int": torch.arange(4),
        "bool": torch.tensor([True, False]),
    }
    if zipped:  # torch itself cannot read fp8 from a legacy file
        state["fp8"] = torch.randn(4).to(torch.float8_e4m3fn)
    file = TorchFile(saved(tmp_path / "model.bin", state, zipped=zipped))
    assert list(file.tensors) == list(state)
    for name, tensor in state.items():
        read = file.read(name)
        assert read.is_contiguous() and not read.requires_grad
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        assert file.tensors[name].shape == tuple(tensor.shape)
    assert file.tensors["bf16"] == TensorInfo("BF16", (5,))
    assert "fp8" not in state or file.tensors["fp8"].dtype == "F8_E4M3"


def test_zip_files_are_mapped(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", {"weight": torch.zeros(1000, 1000)})
    file = TorchFile(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert file.read("weight").sum() == 0


def test_a_training_checkpoint_holds_its_state_dict(tmp_path: Path) -> None:
    weight = torch.randn(2, 3)
    file = TorchFile(saved(tmp_path / "last.pt", {"epoch": 3, "state_dict": {"weight": weight}}))
    assert list(file.tensors) == ["weight"]
    assert torch.equal(file.read("weight"), weight)


def test_a_folder_of_bin_shards_opens(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    saved(tmp_path / "pytorch_model.bin", layer.state_dict())
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(checkpoint.read("weight"), layer.weight)
    assert [file.name for file in checkpoint.identity()] == ["pytorch_model.bin"]


def test_digest_tells_names_shapes_and_dtypes(tmp_path: Path) -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        return TorchFile(saved(tmp_path / "a.bin", {name: tensor})).digest()

    first = digest("w", torch.zeros(2, 3))
    assert digest("w", torch.ones(2, 3)) == first  # the data is not read
    changed = [digest("v", torch.zeros(2, 3)), digest("w", torch.zeros(3, 2)), digest("w", torch.zeros(2, 3).half())]
    assert len({first, *changed}) == 4


class Bomb:
    """Unpickling this touches a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
def test_code_is_never_run(tmp_path: Path, write: str) -> None:
    path, trace = tmp_path / "evil.bin", tmp_path / "it-ran"
    content = {"weight": torch.zeros(2), "x": Bomb(trace)} if write != "pickle" else Bomb(trace)
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        saved(path, content, zipped=write == "zip")
    refusal(path)
    assert not trace.exists()


def test_objects_are_named(tmp_path: Path) -> None:
    text = refusal(saved(tmp_path / "module.bin", torch.nn.Linear(2, 2)))
    assert "holds code or objects (torch.nn.modules.linear.Linear), not just tensors, and is not unpickled" in text


def test_other_states_are_refused(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = saved(tmp_path / "optimizer.pt", torch.optim.Adam([parameter]).state_dict())
    assert "entry 'state' is a dict, not a tensor: not a model's state dict (optimizer or" in refusal(optimizer)
    assert "entry 'step' is a int, not a tensor" in refusal(saved(tmp_path / "s.pt", {"w": parameter, "step": 3}))
    assert "holds a list, not a state dict" in refusal(saved(tmp_path / "l.pt", [parameter]))
    assert "holds a Tensor, not a state dict" in refusal(saved(tmp_path / "t.pt", torch.zeros(2)))
    sparse = saved(tmp_path / "sparse.pt", {"w": torch.eye(3).to_sparse()})
    assert "tensor 'w' is a sparse_coo tensor" in refusal(sparse)
    meta = saved(tmp_path / "meta.pt", {"w": torch.empty(3, device="meta")})
    assert "tensor 'w' is a meta tensor" in refusal(meta)
    wide = saved(tmp_path / "wide.pt", {"w": torch.zeros(3, dtype=torch.complex128)})
    assert "tensor 'w' has the dtype torch.complex128" in refusal(wide)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.004, 0.3, 0.7, 0.999])
def test_a_cut_file_is_one_line(tmp_path: Path, zipped: bool, share: float) -> None:
    path = saved(tmp_path / "model.bin", {"weight": torch.randn(100, 100)}, zipped=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refusal(path)


def test_what_is_no_torch_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for content in (b"", b"\x00" * 100, b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" + b"x" * 50):
        path.write_bytes(content)
        refusal(path)


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    assert "holds a TorchScript program, not a state dict" in refusal(path)
