"""`wtool diff`: the figures are those of the formulas, and the exit code is what was asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved

from wtool.cli import run


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    """A model, and one of which the second layer was changed."""
    a, b = saved(llama(), tmp_path / "a"), saved(llama(), tmp_path / "b")
    tensors = load_file(b / "model.safetensors")
    torch.manual_seed(1)
    for name in tensors:
        if ".1." in name:
            tensors[name] += 0.01 * torch.randn(tensors[name].shape)
    save_file(tensors, b / "model.safetensors")
    return str(a), str(b)


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["diff", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures(models: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, *models, "--all")
    a, b = (load_file(Path(model) / "model.safetensors") for model in models)
    assert (found["compared"], found["equal"], found["identical"]) == (21, 12, False)
    for row in found["tensors"]:
        x, y = a[row["name"]].double().flatten(), b[row["name"]].double().flatten()
        assert row["relative"] == pytest.approx(((x - y).norm() / x.norm()).item())
        assert row["cosine"] == pytest.approx((x @ y / (x.norm() * y.norm())).item())
        assert row["largest"] == pytest.approx((x - y).abs().max().item())
        assert row["equal"] == (".1." not in row["name"])
    x, y = (torch.cat([side[name].double().flatten() for name in a]) for side in (a, b))
    assert found["relative"] == pytest.approx(((x - y).norm() / x.norm()).item())
    assert [layer["relative"] > 0 for layer in found["layers"]] == [False, True]


def test_the_worst_come_first(models: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    distances = [row["relative"] for row in compared(capsys, *models)["tensors"]]
    assert len(distances) == 15 and distances == sorted(distances, reverse=True)
    assert len(compared(capsys, *models, "--top", "3")["tensors"]) == 3
    assert compared(capsys, *models, "--top", "0")["tensors"] == []


def test_shown_to_people(models: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", *models, "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert "21 tensors compared, 12 of them equal: relative distance 0.0" in shown
    assert "layers: from 0 (layer 0) to " in shown and "the 2 furthest apart" in shown
    assert run(["diff", models[0], models[0]]) == 0
    assert capsys.readouterr().out == "identical: 21 tensors, the same in names, shapes, types and values\n"


def test_exit_codes(models: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", *models]) == 0
    assert run(["diff", *models, "--exit-code"]) == 1
    assert run(["diff", models[0], models[0], "--exit-code"]) == 0
    assert run(["diff", models[0], models[1] + "x"]) == 3
    assert "no such file or folder; did you mean 'b'?" in capsys.readouterr().err


def test_all_that_is_no_distance_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nan = torch.tensor([1.0, float("nan")])
    for side, tensors in {
        "a": {"mine": torch.ones(1), "same": torch.ones(2), "shape": torch.ones(2, 3), "odd": torch.zeros(2)},
        "b": {"yours": torch.ones(1), "same": torch.ones(2).half(), "shape": torch.ones(3, 2), "odd": nan},
    }.items():
        (tmp_path / side).mkdir()
        save_file(tensors, tmp_path / side / "model.safetensors")
    models = [str(tmp_path / side) for side in "ab"]
    found = compared(capsys, *models)
    assert (found["only_in_a"], found["only_in_b"], found["dtypes_differ"]) == (["mine"], ["yours"], 1)
    assert found["shapes_differ"] == [{"name": "shape", "a": [2, 3], "b": [3, 2]}]
    assert found["nonfinite"] == [0, 1] and found["tensors"][0]["name"] == "odd"
    assert found["tensors"][0]["relative"] is None  # infinite, which JSON cannot say
    assert run(["diff", *models]) == 0
    shown = capsys.readouterr().out
    for line in (
        "only in a: mine",
        "only in b: yours",
        "shapes differ: shape is [2, 3] in a, [3, 2] in b",
        "types differ: 1 tensors are F32 in a, F16 in b",
        "not finite: 0 elements (NaN or infinity) in a, 1 in b; left out of the distances",
    ):
        assert line in shown.splitlines()
    assert "0 | 1 not finite" in shown


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in "ab":
        (tmp_path / side).mkdir()
        save_file({side: torch.ones(1)}, tmp_path / side / "model.safetensors")
    models = [str(tmp_path / side) for side in "ab"]
    assert compared(capsys, *models)["relative"] is None
    assert run(["diff", *models, "--exit-code"]) == 1
    assert "no tensor is in both with the same shape" in capsys.readouterr().out


def test_a_tied_head_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied, own = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    own.load_state_dict(tied.state_dict())
    models = str(saved(tied, tmp_path / "tied")), str(saved(own, tmp_path / "own"))
    found = compared(capsys, *models)
    assert found["identical"] and found["tied"] == [{"a": "model.embed_tokens.weight", "b": "lm_head.weight"}]


def test_packed_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a.qweight": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    assert run(["diff", str(tmp_path), str(tmp_path)]) == 3
    assert "a.qweight" in capsys.readouterr().err
