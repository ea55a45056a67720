"""Files as documents: passages that make up the text again, rows with their line numbers, errors in one line."""

import json
from pathlib import Path

import pytest
import xxhash

from wtool.calibration_data import files
from wtool.calibration_data.files import open_file
from wtool.calibration_data.rows import Chat, Rows, Text, Tokens
from wtool.errors import InputError, MalformedFile


def opened(path: Path, content: bytes | str, column: str | None = None) -> Rows:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_file(path, path.name, column)


def texts(rows: Rows) -> list[str]:
    documents = [rows.read(number) for number in range(rows.count)]
    assert all(isinstance(document, Text) for document in documents)
    return [document.text for document in documents if isinstance(document, Text)]


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "\n",
        "one line\n" * 40,
        "no end of line " * 20,
        "字" * 100,
        "a" + "🙂" * 50,
        "x" * 64,
        "x" * 16 + "\n" + "y" * 31 + "\n",
        "first\r\nsecond\r\n" * 9,
        "\n" * 100,
    ],
)
@pytest.mark.parametrize("bom", [False, True])
def test_passages_make_up_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, bom: bool) -> None:
    monkeypatch.setattr(files, "PASSAGE", 16)
    content = text.encode("utf-8-sig" if bom else "utf-8")
    rows = opened(tmp_path / "a.txt", content)
    assert "".join(texts(rows)) == text
    assert all(len(passage.encode()) <= 2 * 16 + 3 for passage in texts(rows))
    assert rows.record == {"file": "a.txt", "bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}


def test_passages_end_with_a_line_where_there_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PASSAGE", 32)
    rows = opened(tmp_path / "a.md", "".join(f"line number {number}\n" for number in range(50)))
    assert rows.count > 15 and all(passage.endswith("\n") for passage in texts(rows))
    spaced = texts(opened(tmp_path / "b.txt", "word " * 100))
    assert len(spaced) > 10 and all(passage.startswith(" word") for passage in spaced[1:])


def test_a_text_that_is_short_is_one_document(tmp_path: Path) -> None:
    assert texts(opened(tmp_path / "a.txt", "a few words\n\nand more\n" * 100)) == ["a few words\n\nand more\n" * 100]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", ["utf-8", "utf-8-sig"])
def test_json_lines_with_their_numbers(tmp_path: Path, end: str, last: bool, bom: str) -> None:
    lines = [json.dumps({"text": f"entry {number} é"}, ensure_ascii=number % 2 == 0) for number in range(5)]
    content = end.join(lines) + (end if last else "")
    rows = opened(tmp_path / "a.jsonl", content.encode(bom))
    assert texts(rows) == [f"entry {number} é" for number in range(5)]
    step = end.count("\n")
    assert [rows.read(number).where for number in range(5)] == [f"a.jsonl:{1 + step * number}" for number in range(5)]
    assert (rows.record["key"], rows.record["rows"]) == ("text", 5)


def test_a_json_array_is_its_rows(tmp_path: Path) -> None:
    content = json.dumps([{"text": "a"}, {"text": "b"}], indent=1)
    rows = opened(tmp_path / "a.json", "  " + content)
    assert texts(rows) == ["a", "b"] and rows.read(1).where == "a.json: row 2"
    assert texts(opened(tmp_path / "b.json", '{"text": "x"}\n{"text": "y"}')) == ["x", "y"]


def test_kinds_of_rows(tmp_path: Path) -> None:
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    messages += [{"role": "assistant", "content": "a"}]
    tools = [{"type": "function"}]
    for row, expected in [
        ({"conversations": said}, Chat("a.jsonl:1", messages)),
        ({"messages": messages, "text": "not this"}, Chat("a.jsonl:1", messages)),
        ({"messages": messages, "tools": tools}, Chat("a.jsonl:1", messages, tools)),
        ({"input_ids": [1, 2, 3]}, Tokens("a.jsonl:1", [1, 2, 3])),
        ({"input_ids": [0, 1, 2, 0], "attention_mask": [0, 1, 1, 0]}, Tokens("a.jsonl:1", [1, 2])),
        ({"text": None}, Text("a.jsonl:1", "")),
    ]:
        assert opened(tmp_path / "a.jsonl", json.dumps(row)).read(0) == expected
    named = {"id": "x", "story": "once", "text": "not this"}
    assert opened(tmp_path / "a.jsonl", json.dumps(named), "story").read(0) == Text("a.jsonl:1", "once")


@pytest.mark.parametrize(
    "name, content, kind, message",
    [
        ("a.txt", b"", InputError, "a.txt: no text to calibrate on: the file is empty"),
        ("a.jsonl", b"", InputError, "a.jsonl: no text to calibrate on: the file is empty"),
        ("a.jsonl", b"\n \n", InputError, "a.jsonl: no text to calibrate on: the file has no rows"),
        ("a.json", b"[]", InputError, "a.json: no text to calibrate on: the file has no rows"),
        (
            "a.txt",
            b"good\xff",
            MalformedFile,
            "a.txt: not UTF-8 at byte 4; give plain text, JSON lines or parquet",
        ),
        ("a.jsonl", b'\n{"text": "a"', MalformedFile, "a.jsonl:2: not valid JSON: "),
        ("a.jsonl", b'{"text": "\xff"}', MalformedFile, "a.jsonl:1: not UTF-8 at byte 10 of the line"),
        ("a.json", b"[1,", MalformedFile, "a.json: not valid JSON: "),
        ("a.jsonl", b"7", MalformedFile, "a.jsonl:1: a row of type int, where an object like {'text': …} is expected"),
        (
            "a.jsonl",
            b'{"id": 1, "texts": "a"}',
            InputError,
            "a.jsonl:1: none of input_ids, messages, conversations, text; did you mean 'text'? "
            "(it has id, texts; --text-column names the one to take)",
        ),
        ("a.jsonl", b"{}", InputError, "a.jsonl:1: none of input_ids, messages, conversations, text (it has no key;"),
        (
            "a.jsonl",
            b'{"text": 3}',
            MalformedFile,
            "a.jsonl:1: 'text' is of type int, not a text, a list of messages or a list of token ids",
        ),
        ("a.jsonl", b'{"input_ids": [1.5]}', MalformedFile, "a.jsonl:1: 'input_ids' is of type list of float, not"),
        ("a.jsonl", b'{"input_ids": [true]}', MalformedFile, "a.jsonl:1: 'input_ids' is of type list of bool, not"),
        ("a.jsonl", b'{"input_ids": [3, -1]}', MalformedFile, "a.jsonl:1: token id -1 is negative"),
        (
            "a.jsonl",
            b'{"input_ids": [3], "attention_mask": [1, 1]}',
            MalformedFile,
            "a.jsonl:1: 'attention_mask' is not a list as long as the 1 token ids",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"speaker": "x", "said": "y"}]}',
            MalformedFile,
            "a.jsonl:1: a message with speaker, said; it needs role and content (or from and value)",
        ),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(
    tmp_path: Path, name: str, content: bytes, kind: type[InputError], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path / name, content).read(0)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_later_row_without_the_key(tmp_path: Path) -> None:
    rows = opened(tmp_path / "a.jsonl", '{"text": "a"}\n{"test": "b"}')
    with pytest.raises(InputError, match=r"^a\.jsonl:2: no 'text'; did you mean 'test'\? \(it has test\)$"):
        rows.read(1)


def test_not_utf8_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PASSAGE", 16)
    with pytest.raises(MalformedFile, match="not UTF-8 at byte 1,000;"):
        opened(tmp_path / "a.txt", b"0123456789" * 100 + b"\xe9 " + b"more " * 10)
