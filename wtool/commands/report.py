"""`wtool report`: what was done to a checkpoint, as a page of HTML made from its manifest."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from wtool.errors import MalformedFile, MissingInput, OutputError, OutputExists, UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PARTS = ("recipe", "summary", "report", "left")


@app.command()
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a checkpoint that wtool made")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="page to write [default: OUT-report.html]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the report as JSON; write a page only with -o")
    ] = False,
) -> None:
    """Make a page that tells what was done to a checkpoint, and how well it went."""
    from wtool.console import emit, emit_json
    from wtool.report.html import report_html

    manifest = read_manifest(out)
    page = output or beside(out)
    if output or not as_json:
        write_page(page, out, report_html(manifest, name=out.resolve().name))
    if as_json:
        emit_json({"checkpoint": str(out), **{part: manifest[part] for part in PARTS if part in manifest}})
    else:
        emit(f"{page}: the report of {out}")


def read_manifest(out: Path) -> Mapping[str, Any]:
    """What stands in a checkpoint's wtool.json.

    raises: MissingInput, MalformedFile
    """
    from wtool.writer import MANIFEST

    path = out / MANIFEST
    if not out.is_dir():
        raise MissingInput(f"{out}: no such folder; give a checkpoint that wtool made")
    if not path.is_file():
        raise MissingInput(f"{out}: no {MANIFEST} in it: wtool did not make this checkpoint, or not to the end")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise MalformedFile(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise MalformedFile(f"{path}: a JSON {type(manifest).__name__}, not an object")
    return manifest


def beside(out: Path) -> Path:
    """Where a checkpoint's page is, unless told otherwise: beside its folder."""
    whole = out.resolve()
    name = f"{whole.name}-report.html"
    return out.parent / name if out.name == whole.name else whole.parent / name


def write_page(page: Path, out: Path, content: str) -> None:
    """Write a page, whole or not at all; an older report is replaced, nothing else is.

    raises: UsageError for a place inside the checkpoint, OutputExists, OutputError
    """
    from wtool.report.html import GENERATOR

    if page.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{page}: is inside the checkpoint {out}, which is not to be changed; name a place outside")
    if page.exists() and not (page.is_file() and GENERATOR.encode() in page.read_bytes()[:1000]):
        raise OutputExists(f"{page}: is there and is no report of wtool; name another file with -o")
    unfinished = page.with_name(f"{page.name}.unfinished")
    try:
        unfinished.write_text(content, encoding="utf-8")
        os.replace(unfinished, page)
    except OSError as error:
        raise OutputError(f"{page}: cannot be written: {error.strerror}") from None
