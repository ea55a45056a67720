"""torch .bin, .pt and .pth files: a state dict, mapped, and never unpickled beyond its tensors.

Such a file is a pickle, and a pickle is a program. `torch.load(weights_only=True)` runs only the few
instructions that build tensors and plain containers; what asks for more is refused here, in words, and is never
loaded another way. Files in the zip format (torch 1.6 and later) are mapped, so that a tensor's bytes are read when
they are used; older ones can only be read whole.
"""

import hashlib
import json
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import TensorFile, TensorInfo
from wtool.dtypes import DTYPES, dtype_name
from wtool.errors import MalformedFile

if TYPE_CHECKING:
    import torch

ZIP_MAGIC = b"PK\x03\x04"


class TorchFile(TensorFile):
    """A torch file on disk that holds a state dict."""

    def __init__(self, path: Path):
        self.path = path
        self._state = _state_dict(_load(path), path)
        self.tensors = {name: _info(name, tensor, path) for name, tensor in self._state.items()}

    def digest(self) -> str:
        header = [(name, info.dtype, info.shape) for name, info in self.tensors.items()]
        return hashlib.sha256(json.dumps(header).encode()).hexdigest()

    def read(self, name: str) -> "torch.Tensor":
        return self._state[name].detach().contiguous()


def _load(path: Path) -> Any:
    """The content of the file: tensors (mapped where the format allows it) and plain containers of them."""
    import torch

    with path.open("rb") as file:
        zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and TorchScript: what matters becomes an error
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise MalformedFile(
                f"{path}: holds code or objects ({code[1]}), not just tensors, and is not unpickled: "
                "give the weights as safetensors, or as a file torch.load(weights_only=True) reads"
            ) from None
        raise MalformedFile(f"{path}: not a torch file, or damaged: no state dict can be read from it") from None
    except Exception as error:
        said = str(error)
        if "TorchScript" in said:
            what = "holds a TorchScript program, not a state dict: save its state_dict()"
            raise MalformedFile(f"{path}: {what}") from None
        reason = said.partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise MalformedFile(f"{path}: damaged or cut short (download not finished?): torch says: {reason}") from None


def _state_dict(content: Any, path: Path) -> "dict[str, torch.Tensor]":
    """The content as names and tensors; a training checkpoint's `state_dict` entry is taken for it."""
    import torch

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise MalformedFile(f"{path}: holds a {type(content).__name__}, not a state dict (names and tensors)")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise MalformedFile(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor: "
                "not a model's state dict (optimizer or trainer state?)"
            )
    return content


def _info(name: str, tensor: "torch.Tensor", path: Path) -> TensorInfo:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = "meta" if tensor.device.type == "meta" else str(tensor.layout).removeprefix("torch.")
        raise MalformedFile(f"{path}: tensor '{name}' is a {kind} tensor, which holds no plain values")
    if str(tensor.dtype).removeprefix("torch.") not in [torch_name for _, torch_name in DTYPES.values()]:
        raise MalformedFile(f"{path}: tensor '{name}' has the dtype {tensor.dtype}, which a checkpoint cannot hold")
    return TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))
