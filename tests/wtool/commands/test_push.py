"""Pushing to a local server that speaks the Hub's API, and reading back what was pushed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import close_session
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved

from wtool.cli import run

TOKEN = "hf_mine"
# huggingface_hub hands httpx the file to upload in a way that httpx would rather have written otherwise
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def made(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge of two models of the Hub, and a token that may write to `me`."""
    for seed, name in enumerate(("a", "b")):
        hub.add(f"org/{name}", saved(llama(seed), tmp_path / name))
    hub.writers["me"] = {TOKEN}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    assert run(["merge", "org/a", "org/b", "-o", "out", "--quiet"]) == 0
    return tmp_path / "out"


def told(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which must be the error."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def files_of(hub: HubServer, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.branches[branch]]


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_what_is_pushed_is_read_back_byte_for_byte(hub, made, capsys, tmp_path):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    capsys.readouterr()
    assert run(["push", "out", "me/merged", "--json"]) == 0
    done = told(capsys)
    assert done["private"] and done["commit"] == hub.repositories["me/merged"].branches["main"]
    held = files_of(hub, "me/merged")
    assert {name: held[name] for name in before if name != "README.md"} == {
        name: content for name, content in before.items() if name != "README.md"
    }
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert front(held["README.md"].decode())["base_model"] == ["org/a", "org/b"]

    assert run(["inspect", "me/merged", "--json"]) == 0
    far = told(capsys)
    assert run(["inspect", "out", "--json"]) == 0
    near = told(capsys)
    assert far["parameters"] == near["parameters"] and far["shards"] == near["shards"]
    assert far["revision"] == done["commit"]
    assert run(["merge", "me/merged", "--method", "passthrough", "-o", "again", "--quiet"]) == 0
    again, out = load_file(tmp_path / "again/model.safetensors"), load_file(made / "model.safetensors")
    assert again.keys() == out.keys() and all(torch.equal(again[name], out[name]) for name in out)


def test_a_pushed_model_is_evaluated_as_the_folder_is(hub, made, capsys, tmp_path):
    (tmp_path / "held-out.txt").write_text("a few words to score, and some more of them\n" * 3)
    assert run(["push", "out", "me/merged", "--quiet"]) == 0
    capsys.readouterr()
    results = []
    for name in ("out", "me/merged"):
        assert run(["eval", name, "--text", "held-out.txt", "--window", "16", "--json", "--quiet"]) == 0
        results.append(told(capsys)["texts"])
    assert results[0] == results[1]


def test_a_private_repository_is_for_its_owner_alone(hub, made, capsys, monkeypatch):
    assert run(["push", "out", "me/merged", "--quiet"]) == 0
    monkeypatch.delenv("HF_TOKEN")
    assert run(["inspect", "me/merged"]) == 3
    assert run(["push", "out", "me/open"]) == 4
    assert "no token for the Hub: set HF_TOKEN" in said(capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(["push", "out", "me/open", "--public", "--quiet"]) == 0
    monkeypatch.delenv("HF_TOKEN")
    assert run(["inspect", "me/open"]) == 0


def test_a_public_repository_needs_public_said_again(hub, made, capsys):
    assert run(["push", "out", "me/open", "--public", "--quiet"]) == 0
    assert run(["push", "out", "me/open"]) == 4
    assert "public" in said(capsys)
    assert run(["push", "out", "me/closed", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["push", "out", "me/closed", "--public", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["private"] and "stays so" in captured.err


def test_a_branch_is_made_and_main_is_left(hub, made):
    assert run(["push", "out", "me/merged", "--revision", "v1", "--quiet"]) == 0
    assert "model.safetensors" in files_of(hub, "me/merged", "v1")
    assert set(files_of(hub, "me/merged")) == {".gitattributes"}
    assert run(["inspect", "me/merged@v1"]) == 0
    assert run(["push", "out", "me/merged", "--revision", "v1", "--quiet"]) == 0


def test_weights_of_before_go_and_large_files_are_not_sent_twice(hub, made, capsys):
    assert run(["merge", "org/a", "org/b", "-o", "shards", "--shard-size", "20KB", "--quiet"]) == 0
    assert run(["push", "shards", "me/merged", "--quiet"]) == 0
    old = [name for name in files_of(hub, "me/merged") if name.startswith("model")]
    assert len(old) > 3
    hub.repositories["me/merged"].commit("main", {**files_of(hub, "me/merged"), "x.gguf": b"x", "notes.md": b"x"})
    capsys.readouterr()
    assert run(["push", "out", "me/merged", "--json"]) == 0
    assert told(capsys)["deleted"] == sorted(old)
    held = files_of(hub, "me/merged")
    assert [name for name in held if name.startswith("model")] == ["model.safetensors"]
    assert {"x.gguf", "notes.md"} <= held.keys()
    puts = len([request for request in hub.requests if request.method == "PUT"])
    assert run(["push", "out", "me/again", "--quiet"]) == 0
    assert len([request for request in hub.requests if request.method == "PUT"]) == puts


def test_a_dry_run_asks_nothing_and_shows_the_card(hub, made, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    figures = {"checkpoint": "out", "reference": "/home/me/base"}
    text = {"file": "/home/me/books.txt", "perplexity": 12.34567, "tokens": 4096, "window": 512, "stride": 256}
    text |= {"reference_perplexity": 11.0, "divergence": 0.0123, "agreement": 0.9512}
    (tmp_path / "eval.json").write_text(json.dumps({**figures, "texts": [text]}))
    hub.requests.clear()
    capsys.readouterr()
    assert run(["push", "out", "me/merged", "--dry-run", "--figures", "eval.json", "--json"]) == 0
    shown = told(capsys)
    assert hub.requests == []
    assert shown["private"] and shown["files"]["model.safetensors"] == (made / "model.safetensors").stat().st_size
    row = next(line for line in shown["card"].splitlines() if line.startswith("| books.txt"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["books.txt", "12.3457", "4,096", "512", "256", "base", "11.0000", "0.0123", "95.12%"]
    assert "/home/me" not in shown["card"]
    assert run(["push", "out", "me/merged", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out


def test_what_is_not_finished_is_refused(hub, made, capsys, tmp_path):
    shutil.copytree(made, tmp_path / ".half.wtool/output")
    for folder in ("half", ".half.wtool/output"):
        assert run(["push", folder, "me/half"]) == 4
        assert "is not finished" in said(capsys)
    assert "me/half" not in hub.repositories
    assert run(["push", "nowhere", "me/half"]) == 3
    assert "no such folder" in said(capsys)


def test_a_folder_of_others_goes_with_a_warning_and_a_damaged_one_not_at_all(hub, made, capsys, tmp_path):
    (tmp_path / "a/notes.txt").write_text("mine")
    capsys.readouterr()
    assert run(["push", "a", "me/a", "--json"]) == 0
    captured = capsys.readouterr()
    assert "has no wtool.json" in captured.err and "notes.txt" in captured.err
    assert "notes.txt" not in files_of(hub, "me/a")

    weights = load_file(made / "model.safetensors")
    weights["extra"] = torch.zeros(1)
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    assert run(["push", "out", "me/changed"]) == 0
    assert "changed after wtool made it" in capsys.readouterr().err
    (made / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:-1])
    assert run(["push", "out", "me/damaged"]) == 3
    assert "me/damaged" not in hub.repositories


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["out", "other/merged"], 4, "it needs the right to write to 'other'"),
        (["out", "merged"], 2, "give the repository as ORG/NAME"),
        (["out", "me/merged@v1"], 2, "a branch with --revision"),
        (["out", "me/merged", "--figures", "no.json"], 3, "no.json: no such file"),
        (["out", "me/merged", "--figures", "out/config.json"], 3, "not what wtool eval --json prints"),
    ],
)
def test_refusals_are_one_line(hub, made, capsys, arguments, code, message):
    capsys.readouterr()
    assert run(["push", *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_what_the_hub_says_is_told_with_the_cure(hub, made, capsys, monkeypatch):
    hub.refuse_uploads = 403
    assert run(["push", "out", "me/merged"]) == 4
    assert "403" in said(capsys)
    hub.refuse_uploads = None
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert run(["push", "out", "me/merged"]) == 4
    assert "renew HF_TOKEN" in said(capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.stop()
    close_session()  # which keeps connections open
    assert run(["push", "out", "me/merged"]) == 5
    assert "run it again" in said(capsys)
