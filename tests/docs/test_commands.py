"""Every command of the docs: in console blocks they do what the page shows, elsewhere their flags are known."""

import shlex
from contextlib import chdir
from pathlib import Path

import pytest
from doc_pages import DOCS, Shell, blocks, commands, shape, written_again, wtool_lines
from example_files import make
from typer.main import get_command

from wtool.cli import load

PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]
RUN = [page for page in PAGES if any(block.kind == "console" for block in blocks(page.read_text(encoding="utf-8")))]
README = DOCS.parent / "README.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make(folder)
    return folder


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(DOCS)))
def test_what_a_page_shows_is_what_happens(
    page: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)
    shown = page.read_text(encoding="utf-8")
    with chdir(tmp_path):
        happened = written_again(shown, Shell().run)
    for before, now in zip(blocks(shown), blocks(happened), strict=True):
        if before.kind == "console":
            for told, is_now in zip(commands(before.text), commands(now.text), strict=True):
                assert shape(is_now.printed) == shape(told.printed), (
                    f"{page.name}: {told.line}; python tests/doc_pages.py {page} writes it anew"
                )


@pytest.mark.parametrize("page", [*PAGES, README], ids=[*NAMES, "README.md"])
def test_every_command_has_flags_that_are(page: Path) -> None:
    for line, whole in wtool_lines(page.read_text(encoding="utf-8")):
        if complaint := refused(line, whole):
            pytest.fail(f"{page.name}: {line}: {complaint}")


def refused(line: str, whole: bool) -> str | None:
    """What the command line's parser has against a command.

    whole: it must have all that it needs; else it is one that is named in a sentence
    """
    words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("…", "...")]
    if not words or words[0].startswith("-") or words[0] in ("VERB", "help"):
        return None
    try:
        get_command(load(words[0])).make_context(f"wtool {words[0]}", words[1:])
    except Exception as error:
        incomplete = type(error).__name__ in ("MissingParameter", "BadOptionUsage")
        return None if incomplete and not whole else f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    "line, kind",
    [
        ("wtool merge ./a ./b --metod ties -o ./out", "NoSuchOption"),
        ("wtool merg ./a ./b", "UsageError"),
        ("wtool quantize ./a --bits four", "BadParameter"),
        ("wtool eval ./a", "MissingParameter"),
        ("wtool merge ./a --method", "BadOptionUsage"),
    ],
)
def test_a_wrong_command_would_be_noticed(line: str, kind: str) -> None:
    assert (refused(line, whole=True) or "").startswith(kind)
    assert (refused(line, whole=False) is None) == (kind in ("MissingParameter", "BadOptionUsage"))
