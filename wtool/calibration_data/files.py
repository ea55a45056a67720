"""Text and JSON files as documents. Files are mapped and read where a document lies, so their size is no matter."""

import codecs
import json
import mmap
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from wtool.calibration_data.rows import Document, Rows, Text, document, find_key
from wtool.errors import InputError, MalformedFile

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PASSAGE = 1 << 16  # bytes; a longer text file is cut into passages of about this size


def open_file(path: Path, label: str, column: str | None) -> Rows:
    """The documents of a file: of JSON its rows, of any other its passages.

    label: how the user wrote the path
    column: the key that holds the text, where it is none of the known ones
    raises: InputError for an empty file or an unknown key, MalformedFile
    """
    if not path.stat().st_size:
        raise InputError(f"{label}: no text to calibrate on: the file is empty")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    record = {"file": label, "bytes": len(content), "xxh3": xxhash.xxh3_128(content).hexdigest()}
    if path.suffix.lower() not in JSON_SUFFIXES:
        return _passages(content, label, record)
    if path.suffix.lower() == ".json" and content[:4096].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        return _array(content, label, record, column)
    return _lines(content, label, record, column)


def _passages(content: mmap.mmap, label: str, record: dict[str, Any]) -> Rows:
    """A plain text, in pieces that end with a line where there are lines."""
    ends = array("q", [len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0])
    while ends[-1] < len(content):
        begin = ends[-1]
        ends.append(_cut(content, begin + PASSAGE))
        try:
            content[begin : ends[-1]].decode()
        except UnicodeDecodeError as error:
            raise MalformedFile(
                f"{label}: not UTF-8 at byte {begin + error.start:,}; give plain text, JSON lines or parquet"
            ) from None

    def read(number: int) -> Document:
        return Text(label, content[ends[number] : ends[number + 1]].decode())

    return Rows(label, len(ends) - 1, read, record)


def _cut(content: mmap.mmap, at: int) -> int:
    """Where to cut, from `at` on: after a line, where there is none near before a space, else between characters."""
    if at >= len(content):
        return len(content)
    if (line := content.find(b"\n", at - 1, at + PASSAGE)) >= 0:
        return line + 1
    if (space := content.find(b" ", at, at + PASSAGE)) >= 0:
        return space
    while at < len(content) and content[at] & 0xC0 == 0x80:  # inside a character of several bytes
        at += 1
    return at


def _lines(content: mmap.mmap, label: str, record: dict[str, Any], column: str | None) -> Rows:
    """JSON lines: an object a line, blank lines skipped."""
    begins, numbers = array("q"), array("q")
    begin = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
    number = 0
    while begin < len(content):
        number += 1
        end = content.find(b"\n", begin) + 1 or len(content)
        if not content[begin:end].isspace():
            begins.append(begin)
            numbers.append(number)
        begin = end

    def load(index: int) -> tuple[Any, str]:
        begin, where = begins[index], f"{label}:{numbers[index]}"
        end = content.find(b"\n", begin) + 1 or len(content)
        return _json(content[begin:end], where), where

    return _rows(len(begins), load, label, record, column)


def _array(content: mmap.mmap, label: str, record: dict[str, Any], column: str | None) -> Rows:
    """A JSON file that is one list of rows; it is read whole."""
    rows = _json(content[:].removeprefix(codecs.BOM_UTF8), label)
    return _rows(len(rows), lambda index: (rows[index], f"{label}: row {index + 1}"), label, record, column)


def _rows(
    count: int, load: Callable[[int], tuple[Any, str]], label: str, record: dict[str, Any], column: str | None
) -> Rows:
    """load: the row of a number, and how an error names its place"""
    if not count:
        raise InputError(f"{label}: no text to calibrate on: the file has no rows")
    key = find_key(*load(0), column)

    def read(number: int) -> Document:
        return document(*load(number), key)

    return Rows(label, count, read, {**record, "key": key, "rows": count})


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise MalformedFile(f"{where}: not UTF-8 at byte {error.start:,} of the line") from None
    except ValueError as error:
        raise MalformedFile(f"{where}: not valid JSON: {error}") from None
