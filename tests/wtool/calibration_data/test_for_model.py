"""Windows that fit the model they are for."""

import json
from pathlib import Path

import pytest
from families import saved_family
from tiny_models import TEXT

from wtool.calibration_data import CalibrationSource
from wtool.calibration_data.for_model import windows_for
from wtool.checkpoint import open_checkpoint
from wtool.errors import Mismatch, MissingInput


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_no_window_is_longer_than_the_positions_a_model_has(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    saved_family(name, tmp_path / "model")
    source = CalibrationSource((str(tmp_path / "text.txt"),), samples=2, length=2048)
    found = windows_for(open_checkpoint(str(tmp_path / "model")), source)
    assert found.ids.shape == (2, 64)
    assert any("64" in remark for remark in found.remarks)


def test_rows_of_ids_need_no_tokenizer_and_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    saved_family("llama", tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    rows = tmp_path / "ids.jsonl"
    rows.write_text(json.dumps({"input_ids": [5, 6, 7, 319]}) + "\n")
    source = CalibrationSource((str(rows),), samples=1, length=4)
    assert windows_for(checkpoint, source).ids.tolist() == [[5, 6, 7, 319]]
    rows.write_text(json.dumps({"input_ids": [5, 6, 7, 320]}) + "\n")
    with pytest.raises(Mismatch, match="token 320, but the model's vocabulary has 320"):
        windows_for(checkpoint, source)
    with pytest.raises(MissingInput, match="no tokenizer"):
        windows_for(checkpoint, CalibrationSource(samples=1, length=4))
