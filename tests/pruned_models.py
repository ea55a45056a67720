"""What a pruned checkpoint holds, and how transformers opens it."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from wtool.checkpoint import open_checkpoint
from wtool.linear_names import linear_layers
from wtool.loading import quiet


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "wtool.json").read_text())


def matrices(folder: Path) -> dict[str, Tensor]:
    """The linears of a checkpoint [out, in], by their tensors."""
    source = open_checkpoint(str(folder))
    found, _ = linear_layers(source)
    return {name: source.read(name).T if each.transposed else source.read(name) for name, each in found.items()}


def opened(folder: Path) -> PreTrainedModel:
    """The model as transformers opens it, once it is clear that every tensor found its place."""
    loader: Any = AutoModelForCausalLM
    with quiet():
        model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()
