"""A text to evaluate on, as the user has it."""

from pathlib import Path

from wtool.errors import InputError, MalformedFile, MissingInput


def read_text(path: Path) -> str:
    """A text file's content.

    raises: MissingInput, MalformedFile, InputError for an empty one
    """
    if not path.is_file():
        raise MissingInput(f"{path}: no such text file")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"{path}: not UTF-8 at byte {error.start:,}; give a plain text file") from None
    if not content:
        raise InputError(f"{path}: nothing to score: the text is empty")
    return content
