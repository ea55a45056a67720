"""`wtool report`: the page stands beside the checkpoint, which is not touched, and nothing else is replaced."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from wtool.commands.report import app
from wtool.errors import MalformedFile, MissingInput, OutputError, OutputExists, UsageError, WtoolError

MANIFEST = {
    "wtool": "0.1.0",
    "recipe": {"quantize": {"method": "rtn", "bits": 4}},
    "report": {"h.0.a": {"weight_error": 0.125}},
    "summary": {"bytes_before": 8, "bytes_after": 2},
    "tensors_xxh3": {"h.0.a.weight": "00"},
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "q4"
    folder.mkdir()
    (folder / "wtool.json").write_text(json.dumps(MANIFEST))
    return folder


def report(*arguments: object) -> Any:
    return app(args=[str(argument) for argument in arguments], prog_name="wtool report", standalone_mode=False)


def refusal(*arguments: object) -> WtoolError:
    with pytest.raises(WtoolError) as caught:
        report(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_page_beside_the_checkpoint(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(out)
    page = out.parent / "q4-report.html"
    assert capsys.readouterr().out == f"{page}: the report of {out}\n"
    assert "<h1>q4</h1>" in page.read_text() and "0.1250" in page.read_text()
    assert [file.name for file in out.iterdir()] == ["wtool.json"]
    assert sorted(file.name for file in out.parent.iterdir()) == ["q4", "q4-report.html"]


def test_a_page_elsewhere_and_again(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "elsewhere.html"
    report(out, "-o", page)
    before = page.read_bytes()
    (out / "wtool.json").write_text(json.dumps({**MANIFEST, "report": {"h.0.a": {"weight_error": 0.375}}}))
    report(out, "-o", page)
    assert b"0.1250" in before and b"0.3750" in page.read_bytes() and b"0.1250" not in page.read_bytes()
    assert not (tmp_path / "q4-report.html").exists()


@pytest.mark.parametrize("name", [".", "../q4", "../q4/"])
def test_from_inside_the_folder(out: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(out)
    report(name)
    assert (out.parent / "q4-report.html").is_file()
    assert [file.name for file in out.iterdir()] == ["wtool.json"]


def test_for_scripts(out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report(out, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told == {"checkpoint": str(out), **{key: MANIFEST[key] for key in ("recipe", "summary", "report")}}
    assert not (tmp_path / "q4-report.html").exists()
    report(out, "--json", "-o", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()


def test_what_is_no_checkpoint_of_ours(tmp_path: Path, out: Path) -> None:
    (tmp_path / "other").mkdir()
    missing = refusal(tmp_path / "none")
    assert type(missing) is MissingInput
    assert str(missing) == f"{tmp_path / 'none'}: no such folder; give a checkpoint that wtool made"
    assert str(refusal(tmp_path / "other")) == (
        f"{tmp_path / 'other'}: no wtool.json in it: wtool did not make this checkpoint, or not to the end"
    )
    (out / "wtool.json").write_text("{")
    assert type(refusal(out)) is MalformedFile
    (out / "wtool.json").write_text("[1]")
    assert str(refusal(out)) == f"{out / 'wtool.json'}: a JSON list, not an object"
    (out / "wtool.json").write_bytes(b"\xff")
    assert str(refusal(out)).startswith(f"{out / 'wtool.json'}: not valid JSON: ")


@pytest.mark.parametrize("name", ["page.html", "deep/page.html", "../q4/page.html", "."])
def test_never_inside_the_checkpoint(out: Path, name: str) -> None:
    found = refusal(out, "-o", out / name)
    assert type(found) is UsageError and "is inside the checkpoint" in str(found)
    assert [file.name for file in out.iterdir()] == ["wtool.json"]


def test_other_files_are_not_replaced(out: Path, tmp_path: Path) -> None:
    (tmp_path / "q4-report.html").write_text("my notes")
    found = refusal(out)
    assert type(found) is OutputExists
    assert str(found) == f"{tmp_path / 'q4-report.html'}: is there and is no report of wtool; name another file with -o"
    assert (tmp_path / "q4-report.html").read_text() == "my notes"
    assert type(refusal(out, "-o", tmp_path)) is OutputExists  # a folder


def test_where_nothing_can_be_written(out: Path, tmp_path: Path) -> None:
    found = refusal(out, "-o", tmp_path / "none" / "page.html")
    assert type(found) is OutputError
    assert str(found) == f"{tmp_path / 'none' / 'page.html'}: cannot be written: No such file or directory"


EVAL = {
    "checkpoint": "q4",
    "reference": "base",
    "texts": [{"file": "a.txt", "perplexity": 2.5, "tokens": 9, "window": 8, "divergence": 0.125}],
}


def test_several_in_one_page(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(out.parent)
    (other := out.parent / "b" / "q4").mkdir(parents=True)
    (other / "wtool.json").write_text(json.dumps(MANIFEST))
    (out.parent / "e.json").write_text(json.dumps(EVAL))
    report("q4", "b/q4", "--eval", "e.json")
    assert capsys.readouterr().out == "report.html: the report of q4, b/q4\n"
    page = (out.parent / "report.html").read_text()
    assert "Side by side" in page and "<h1>b/q4</h1>" in page and "a.txt: KL" in page and "0.1250" in page
    report("q4", "b/q4", "--json")
    assert [each["checkpoint"] for each in json.loads(capsys.readouterr().out)["checkpoints"]] == ["q4", "b/q4"]
    assert str(refusal("q4", "./q4")) == "q4: is given twice; name each checkpoint once"


def test_scores_that_are_none(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    assert str(refusal(out, "--eval", path)) == f"{path}: no such file; make it with wtool eval --json > {path}"
    path.write_text("{}")
    assert type(refusal(out, "--eval", path)) is MalformedFile
    assert not (tmp_path / "q4-report.html").exists()


def test_plots_alone(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py", reason="pip install 'wtool[png]'")
    report(out, "--png", tmp_path / "plots")
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'plots'}: weight-error-h.png\n")
    assert (tmp_path / "plots" / "weight-error-h.png").read_bytes()[:4] == b"\x89PNG"
    assert type(refusal(out, "--png", out / "plots")) is UsageError


def test_plots_without_their_package(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)  # as if it were not installed
    found = refusal(out, "--png", tmp_path / "plots")
    assert str(found) == "--png needs the package resvg-py: pip install 'wtool[png]'"
    assert not (tmp_path / "plots").exists()
