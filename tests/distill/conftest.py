"""A small teacher, text to learn from, and distilling as a user does."""

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tiny_models import llama, saved

from wtool.cli import run

Distill = Callable[..., Path]


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in ("for", "while", "class", "import", "lambda", "try", "with")))
    return path


@pytest.fixture(scope="package")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of four layers in float32."""
    made = llama(num_hidden_layers=4, hidden_size=48, intermediate_size=64, initializer_range=0.1)
    return saved(made, tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def distill(teacher: Path, text: Path, tmp_path: Path) -> Distill:
    """Distil a student of two of the teacher's layers; the output's folder."""

    def go(*flags: str, name: str = "out", of: Path = teacher) -> Path:
        out = tmp_path / name
        student = (
            [] if any(flag.startswith("--student") for flag in flags) or of != teacher else ["--student-layers", "2"]
        )
        data = ["--data", str(text), "--seqlen", "32", "--held-out", "4"] if of == teacher else []
        length = [] if {"--epochs", "--tokens"} & set(flags) else ["--steps", "6"] if "--steps" not in flags else []
        often = [] if "--evaluate-every" in flags else ["--evaluate-every", "100"]
        rate = [] if "--lr" in flags else ["--lr", "3e-3"]
        assert (
            run(["distill", str(of), *student, *data, *length, *often, *rate, *flags, "-o", str(out), "--quiet"]) == 0
        )
        return out

    return go
