"""Datasets read by the real library: local ones in this process, those of a Hub on this machine in one of its own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import pytest
from tiny_models import tokenizer

from wtool.calibration_data import CalibrationSource, windows
from wtool.calibration_data.hub import open_dataset
from wtool.calibration_data.rows import Rows, Text, Tokens
from wtool.errors import InputError, RuntimeProblem

COMMIT = "0123456789" * 4
ROWS = [{"text": f"row {number} {'x' * number}"} for number in range(100)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def opened(reference: Path | str, column: str | None = None, split: str = "train", characters: int = 10**9) -> Rows:
    return open_dataset(str(reference), split=split, column=column, characters=characters)


def texts(rows: Rows) -> list[str]:
    documents = [rows.read(number) for number in range(rows.count)]
    return [document.text for document in documents if isinstance(document, Text)]


@pytest.fixture(params=["folder", "parquet"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same rows in each form that lies on a disk."""
    if request.param == "folder":
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_bytes(LINES)
        return tmp_path / "set"
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_rows_in_their_order(local: Path) -> None:
    rows = opened(local)
    assert texts(rows) == [row["text"] for row in ROWS]
    assert rows.read(7).where == f"{local}: row 8"
    assert (rows.record["rows"], rows.record["split"], rows.record["key"]) == (100, "train", "text")


def test_no_more_rows_than_needed(local: Path) -> None:
    rows = opened(local, characters=200)
    assert texts(rows) == [row["text"] for row in ROWS[: rows.count]]
    assert sum(map(len, texts(rows))) >= 200 > sum(map(len, texts(rows)[:-1]))


def test_the_digest_is_of_the_rows_not_of_their_place(tmp_path: Path) -> None:
    for name in "ab":
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / f"{name}.parquet")
    digests = [opened(tmp_path / f"{name}.parquet").record["xxh3"] for name in "ab"]
    assert digests[0] == digests[1] != opened(tmp_path / "a.parquet", characters=50).record["xxh3"]


def test_windows_of_a_dataset_are_those_of_a_file_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    found = [
        windows(CalibrationSource((str(tmp_path / name),), samples=5, length=32, seed=4), tokenizer()).ids.tolist()
        for name in ("a.jsonl", "a.parquet")
    ]
    assert found[0] == found[1]


def test_columns_of_other_names_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    datasets.Dataset.from_list([{"story": "once", "numbers": [3, 4], "messages": talk}]).to_parquet(path)
    assert opened(path, "story").read(0) == Text(f"{path}: row 1", "once")
    assert opened(path, "numbers").read(0) == Tokens(f"{path}: row 1", [3, 4])
    chat = opened(path).read(0)
    assert getattr(chat, "messages", None) == talk


@pytest.mark.parametrize(
    "split, column, message",
    [
        ("validation", None, ": the datasets package cannot read it: "),
        ("train", "txt", ": row 1: no 'txt'; did you mean 'text'? (it has text)"),
    ],
)
def test_refusals_in_one_line(tmp_path: Path, split: str, column: str | None, message: str) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "a.parquet", column, split)
    assert str(caught.value).startswith(f"{tmp_path / 'a.parquet'}{message}") and "\n" not in str(caught.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeProblem) as caught:
        opened("org/name")
    assert str(caught.value) == "org/name: reading datasets needs the datasets package: pip install 'wtool[datasets]'"


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that `datasets` calls, with one dataset of one file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == f"/datasets/org/data/resolve/{COMMIT}/train.jsonl":
            self.answer(LINES, {"ETag": '"train"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/datasets/org/data/tree/"):
            entry = {"type": "file", "path": "train.jsonl", "size": len(LINES), "oid": "1" * 40}
            self.answer(json.dumps([entry] if path.endswith(COMMIT) else []).encode())
        elif path.startswith("/api/datasets/org/data"):
            about = {"id": "org/data", "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}
            self.answer(json.dumps(about).encode())
        else:
            self.answer(b"", {"X-Error-Code": "RepoNotFound" if path.startswith("/api/") else "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        if status == 200 and (asked := self.headers.get("Range")):
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def elsewhere(references: list[str], home: Path, **environment: str) -> list[str]:
    """What comes of references in a process of its own: `datasets` reads the environment when it is imported."""
    code = (
        "import json, sys\n"
        "from wtool.calibration_data.hub import open_dataset\n"
        "from wtool.errors import WtoolError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        rows = open_dataset(name, split='train', column=None, characters=500)\n"
        "        print(json.dumps([rows.read(i).text for i in range(rows.count)]), json.dumps(rows.record), sep='|')\n"
        "    except WtoolError as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    ran = subprocess.run(
        [sys.executable, "-c", code, *references],
        env={**kept, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.splitlines()


def test_a_dataset_of_the_hub(endpoint: str, tmp_path: Path) -> None:
    references = ["org/data", "org/data:default@main", "org/data:french", "org/none"]
    plain, named, wrong, none = elsewhere(references, tmp_path, HF_ENDPOINT=endpoint)
    content, record = map(json.loads, plain.split("|"))
    assert content == [row["text"] for row in ROWS[: len(content)]] and 500 <= sum(map(len, content)) < 600
    assert (record["dataset"], record["revision"], record["rows"]) == ("org/data", COMMIT, len(content))
    assert named.split("|")[0] == plain.split("|")[0] and '"configuration": "default"' in named
    assert wrong.startswith("InputError org/data:french: the datasets package cannot read it: ") and "french" in wrong
    assert none.startswith("MissingInput org/none: no such file or folder here, and no such repository on the Hub")


def test_no_hub_and_no_cache(tmp_path: Path) -> None:
    (found,) = elsewhere(["org/data"], tmp_path, HF_HUB_OFFLINE="1")
    assert found == (
        "RuntimeProblem org/data: the Hub cannot be reached, and the cache of the datasets package does not hold it: "
        "check the network and HF_ENDPOINT, or give a text file"
    )
