"""Small trained models, which ship with the demo, and text, in a folder that the tests work in."""

import shutil
from pathlib import Path

import pytest

from wtool.commands.demo import MODELS
from wtool.demo.texts import held_out_text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ./base, ./docs, ./code and held.txt, from which commands are given."""
    for name in ("base", "docs", "code"):
        shutil.copytree(MODELS / name, tmp_path / name)
    (tmp_path / "held.txt").write_text(held_out_text("docs", 6000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path
