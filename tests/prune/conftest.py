"""Small models of several families, text to calibrate on, and pruning as a user does."""

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from families import family
from tiny_models import saved
from transformers import PreTrainedModel

from wtool.cli import run

CALIBRATION = ["--samples", "8", "--seqlen", "48"]
Prune = Callable[..., Path]
Full = Callable[[str], tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(topics[name] for name in ("for", "while", "class", "import", "lambda")))
    return path


@pytest.fixture(scope="package")
def full(tmp_path_factory: pytest.TempPathFactory) -> Full:
    """A random model of a family, its norms and biases too, and the folder where it is saved with a tokenizer."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(name: str) -> tuple[PreTrainedModel, Path]:
        if name not in made:
            model = family(name)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            made[name] = model, saved(model, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


@pytest.fixture
def prune(text: Path, tmp_path: Path) -> Prune:
    """Prune on the calibration text where there is any need of it; the output's folder."""

    def go(model: Path, *flags: str, name: str = "out") -> Path:
        out = tmp_path / name
        alone = {"magnitude", "svd", "--stats"} & set(flags)
        calibration = [] if alone else ["--calib", str(text), *CALIBRATION]
        assert run(["prune", str(model), *flags, *calibration, "-o", str(out), "--quiet"]) == 0
        return out

    return go
