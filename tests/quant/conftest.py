"""A small model to quantize, and text to calibrate on."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tiny_models import llama, saved


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(topics[name] for name in ("for", "while", "class", "import", "lambda")))
    return path


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of three layers in bfloat16."""
    made = llama(num_hidden_layers=3, hidden_size=64, intermediate_size=96, initializer_range=0.1)
    return saved(made.to(torch.bfloat16), tmp_path_factory.mktemp("models") / "llama")
