"""The commands on the pages of docs/: found, run in their order, and compared with what the page says they print.

In a block marked `console`, lines that begin with `$ ` are commands and the lines after them what they print, stdout
and stderr together. Run are `wtool …` (with `> FILE` if need be), `cat FILE` and `echo $?`. A block with a title is a
file of that name. `python tests/doc_pages.py PAGE…` writes what the commands print now into the pages.
"""

import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_NUMBER = re.compile(r"[\d.,]*\d")
_LAYER = re.compile(r"model\.layers\.\S+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    title: str | None  # the file it is
    text: str
    begin: int  # where its text stands in the page
    end: int


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    line: str
    printed: str  # what the page says it prints


def blocks(page: str) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(page):
        title = _TITLE.search(match[2])
        found.append(Block(match[1], title and title[1], match[3], match.start(3), match.end(3)))
    return found


def commands(text: str) -> list[Command]:
    """The commands of a console block; a line that ends with a backslash goes on in the next."""
    found: list[Command] = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        whole = re.match(r"(?:[^\n]*\\\n)*[^\n]*\n?", part)
        assert whole
        found.append(Command(whole[0].replace("\\\n", " ").strip(), part[whole.end() :]))
    return found


def wtool_lines(page: str) -> Iterator[tuple[str, bool]]:
    """Every command `wtool …` that is not run, in another block or in the text, and whether it is written out whole."""
    for block in blocks(page):
        if block.kind in ("console", "text"):  # run, or printed
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith("wtool "):
                yield line.split(" > ")[0], True
    for match in re.finditer(r"`(wtool [^`\n]+)`", _BLOCK.sub("", page)):
        yield match[1], False


def written_again(page: str, run: Callable[[str], str]) -> str:
    """A page with what its commands print now."""
    for block in reversed(list(_run_in_order(page, run))):
        page = page[: block.begin] + block.text + page[block.end :]
    return page


def _run_in_order(page: str, run: Callable[[str], str]) -> Iterator[Block]:
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.kind == "console":
            parts = re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE)
            text = "".join(_again(part, run) for part in parts if part)
            yield Block(block.kind, None, text, block.begin, block.end)


def _again(part: str, run: Callable[[str], str]) -> str:
    (command,) = commands(part)
    asked = part[: len(part) - len(command.printed)]
    printed = [line.rstrip() for line in run(command.line).splitlines()]
    return asked + "".join(f"{line}\n" for line in printed if line)


class Shell:
    """Runs commands in this process, in the folder it is in."""

    def __init__(self) -> None:
        self.code = 0

    def run(self, line: str) -> str:
        """What a command prints."""
        words = shlex.split(line, comments=True)
        if words == ["echo", "$?"]:
            return f"{self.code}\n"
        if words[0] == "cat":
            return "".join(Path(word).read_text(encoding="utf-8") for word in words[1:])
        assert words[0] == "wtool", f"a console block runs wtool, cat and echo $?, not {line!r}"
        return self._wtool(words[1:])

    def _wtool(self, words: list[str]) -> str:
        from wtool.cli import run

        into = words[words.index(">") + 1] if ">" in words else None
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(out if into is None else err):
            self.code = run(words[: words.index(">")] if into else words)
        if into:
            Path(into).write_text(out.getvalue(), encoding="utf-8")
        return err.getvalue() if into else out.getvalue()


def shape(printed: str) -> str:
    """What is printed, without what depends on the machine: numbers, distances, and which layer is the worst."""
    return " ".join(re.sub(r"[─ ]+", " ", _NUMBER.sub("#", _LAYER.sub("LAYER", printed))).split())


def main(pages: list[str]) -> None:
    """Write anew what the commands of pages print."""
    sys.path.insert(0, str(DOCS))
    from example_files import make

    os.environ["COLUMNS"] = "100"
    for page in pages:
        path = Path(page).resolve()
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            make(Path())
            path.write_text(written_again(path.read_text(encoding="utf-8"), Shell().run), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
