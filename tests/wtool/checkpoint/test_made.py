"""Checkpoints that wtool made are known by their manifest, others by when they were changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_models import llama, saved

from wtool.checkpoint import open_checkpoint
from wtool.checkpoint.made import MANIFEST
from wtool.cli import run


@pytest.fixture
def made(tmp_path: Path) -> Path:
    model = saved(llama(), tmp_path / "model")
    assert run(["merge", str(model), "--method", "passthrough", "-o", str(tmp_path / "made"), "--quiet"]) == 0
    return tmp_path / "made"


def versions(folder: Path) -> list[str]:
    return [file.version for file in open_checkpoint(str(folder)).identity()]


def test_the_same_work_has_the_same_identity_whenever_it_was_done(made: Path, tmp_path: Path) -> None:
    again = shutil.copytree(made, tmp_path / "again")
    for folder, moment in ((made, 10**18), (again, 2 * 10**18)):
        for path in folder.iterdir():
            os.utime(path, ns=(moment, moment))
    assert versions(made) == versions(again)
    manifest = again / MANIFEST
    manifest.write_text(manifest.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    assert versions(made) != versions(again)


def test_files_that_were_changed_after_the_manifest_are_known_by_that(made: Path) -> None:
    before = versions(made)
    later = (made / MANIFEST).stat().st_mtime_ns + 10**9
    os.utime(made / "model.safetensors", ns=(later, later))
    assert versions(made) == [str(later)] != before


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"tensors_xxh3": {}})])
def test_a_manifest_that_tells_nothing_of_tensors_counts_for_nothing(made: Path, content: str) -> None:
    (made / MANIFEST).write_text(content)
    assert versions(made) == [str((made / "model.safetensors").stat().st_mtime_ns)]
