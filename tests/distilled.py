"""Looking at what a distillation has written."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from wtool.checkpoint import open_checkpoint
from wtool.loading import load_model


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_text())


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits(folder: Path, ids: Tensor) -> Tensor:
    """In float64, of float32 weights."""
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)), dtype="F32")(input_ids=ids).logits.double()
