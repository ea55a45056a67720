"""Calibration text for who has none: prose and code that every CPython carries, so that it is at hand offline.

Three kinds, which do not repeat one another: topics of the language reference; the docstrings and block comments of
one half of the standard library's modules, set free of their code; the source of the other half, of each only the
beginning, so that many hands are heard. Modules that some distributions leave out are not used, so that equal
versions of Python give equal text, and neither is what the demo holds out, so that it can measure what was calibrated.

All of it is about programs: text like that which the model is to read does better.
"""

import ast
import platform
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from wtool.calibration_data.rows import Rows, Text
from wtool.demo.texts import HELD_OUT_MODULES, training_documents
from wtool.writer import checksum

# Absent here and there, or different from machine to machine; or tables rather than text.
LEFT_OUT = (
    "__phello__ distutils encodings ensurepip idlelib lib2to3 pydoc_data site sitecustomize sre_constants stringprep "
    "sysconfig test tkinter turtledemo unittest venv"
).split()
CODE = 4_500  # characters of a module's source
SHORTEST = 400  # characters of a document
_COMMENT = re.compile(r"(?:^[ \t]*#.*\n){3,}", re.MULTILINE)  # of three lines or more: a remark on one line is no prose


def builtin() -> Rows:
    """The text that Python carries, as one document a topic or module."""
    documents = list(texts().items())

    def read(number: int) -> Text:
        name, text = documents[number]
        return Text(f"Python's {name}", text)

    record = {
        "builtin": "manual and standard library",
        "python": platform.python_version(),
        "documents": len(documents),
        "xxh3": checksum(repr(documents).encode()),
    }
    return Rows("the text that Python carries", len(documents), read, record)


def texts() -> dict[str, str]:
    """Every document by its name, in an order that only Python's version decides."""
    found = {f"manual/{name}": text for name, text in training_documents("docs").items()}
    for path in modules():
        source = path.read_text(encoding="utf-8", errors="replace")
        name = ".".join(path.relative_to(_library()).with_suffix("").parts)
        prose = zlib.crc32(name.encode()) % 2 == 0
        found[f"{'prose' if prose else 'code'}/{name}"] = _prose(source) if prose else _beginning(source)
    return {name: text for name, text in found.items() if len(text) >= SHORTEST}


def modules() -> list[Path]:
    """The standard library's source files, in the order of their names."""
    library = _library()
    names = sorted(sys.stdlib_module_names.difference(LEFT_OUT, HELD_OUT_MODULES))
    names = [name for name in names if not name.startswith(("_sysconfig", "_distutils"))]
    single = [library / f"{name}.py" for name in names]
    inside = [path for name in names for path in sorted((library / name).rglob("*.py"))]
    return [path for path in [*single, *inside] if path.is_file()]


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _prose(source: str) -> str:
    """The docstrings and block comments of a source file, as paragraphs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module's own trouble
            tree = ast.parse(source)
    except SyntaxError:
        return ""
    paragraphs = [*_docstrings(tree), *(_uncommented(match[0]) for match in _COMMENT.finditer(source))]
    return "\n\n".join(dict.fromkeys(paragraphs))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                yield text


def _uncommented(block: str) -> str:
    """The text of a comment, without its number signs."""
    lines = [line.strip().lstrip("#").removeprefix(" ") for line in block.splitlines()]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _beginning(source: str) -> str:
    """The first lines of a source file, in whole lines."""
    return source if len(source) <= CODE else source[: source.rfind("\n", 0, CODE) + 1]
