"""`wtool report`: what was done to checkpoints, as a page of HTML made from their manifests."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool.errors import MalformedFile, MissingInput, OutputError, OutputExists, UsageError

if TYPE_CHECKING:
    from wtool.report.quality import Score

app = typer.Typer(add_completion=False, rich_markup_mode=None)

PARTS = ("recipe", "summary", "report", "left")
TOGETHER = "report.html"


@app.command()
def report(
    outs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="checkpoints that wtool made")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"page to write [default: OUT-report.html; of several {TOGETHER}]"),
    ] = None,
    evals: Annotated[
        list[Path] | None, typer.Option("--eval", help="what wtool eval --json printed, for the table of quality")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="folder for the plots alone, as PNG files (pip install 'wtool[png]')")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the report as JSON; write a page only with -o")
    ] = False,
) -> None:
    """Make a page that tells what was done to checkpoints, and how well it went; several are compared."""
    from wtool.console import emit, emit_json
    from wtool.report.html import comparison_html, report_html

    named = [(name, read_manifest(out)) for name, out in zip(names(outs), outs, strict=True)]
    places = {out.resolve(): name for out, (name, _) in zip(outs, named, strict=True)}
    scores = [_placed(score, places) for path in evals or () for score in read_scores(path)]
    page = output or (beside(outs[0]) if len(outs) == 1 else Path(TOGETHER))
    if png:
        refuse_inside(png, outs)
    if output or not as_json:
        (name, manifest), *more = named
        content = comparison_html(named, scores=scores) if more else report_html(manifest, name=name, scores=scores)
        write_page(page, outs, content)
    drawn = write_plots(png, named) if png else []
    if as_json:
        told = [_told(out, manifest) for out, (_, manifest) in zip(outs, named, strict=True)]
        emit_json(told[0] if len(told) == 1 else {"checkpoints": told})
    else:
        emit(f"{page}: the report of {', '.join(map(str, outs))}")
        if png:
            emit(f"{png}: {', '.join(drawn) or 'nothing to draw'}")


def names(outs: Sequence[Path]) -> list[str]:
    """The names of folders, as long as it takes to tell them apart.

    raises: UsageError for the same folder twice
    """
    whole = [out.resolve() for out in outs]
    for number, each in enumerate(whole):
        if each in whole[:number]:
            raise UsageError(f"{outs[number]}: is given twice; name each checkpoint once")
    longest = max(len(each.parts) for each in whole)
    for count in range(1, longest):
        told = ["/".join(each.parts[-count:]) for each in whole]
        if len(set(told)) == len(told):
            return told
    return [str(each) for each in whole]


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
    manifest = _parsed(path)
    if not isinstance(manifest, dict):
        raise MalformedFile(f"{path}: a JSON {type(manifest).__name__}, not an object")
    return manifest


def read_scores(path: Path) -> "list[Score]":
    """What stands in a file that `wtool eval --json` was written to.

    raises: MissingInput, MalformedFile
    """
    from wtool.report.quality import scores

    if not path.is_file():
        raise MissingInput(f"{path}: no such file; make it with wtool eval --json > {path}")
    return scores(_parsed(path), str(path))


def beside(out: Path) -> Path:
    """Where a checkpoint's page is, unless told otherwise: beside its folder."""
    whole = out.resolve()
    name = f"{whole.name}-report.html"
    return out.parent / name if out.name == whole.name else whole.parent / name


def write_page(page: Path, outs: Sequence[Path], content: str) -> None:
    """Write a page, whole or not at all; an older report is replaced, nothing else is.

    raises: UsageError for a place inside a checkpoint, OutputExists, OutputError
    """
    from wtool.report.html import GENERATOR

    refuse_inside(page, outs)
    if page.exists() and not (page.is_file() and GENERATOR.encode() in page.read_bytes()[:1000]):
        raise OutputExists(f"{page}: is there and is no report of wtool; name another file with -o")
    unfinished = page.with_name(f"{page.name}.unfinished")
    try:
        unfinished.write_text(content, encoding="utf-8")
        os.replace(unfinished, page)
    except OSError as error:
        raise OutputError(f"{page}: cannot be written: {error.strerror}") from None


def refuse_inside(place: Path, outs: Sequence[Path]) -> None:
    """raises: UsageError for a place inside a checkpoint"""
    for out in outs:
        if place.resolve().is_relative_to(out.resolve()):
            told = f"{place}: is inside the checkpoint {out}, which is not to be changed; name a place outside"
            raise UsageError(told)


def write_plots(folder: Path, named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Write every picture of the checkpoints; of several, each name begins with its checkpoint's.

    returns: the files' names
    raises: RuntimeProblem without resvg-py, OutputError
    """
    from wtool.report.plots import plots, png

    made: dict[str, bytes] = {}
    for name, manifest in named:
        first = f"{name.replace('/', '-')}-" if len(named) > 1 else ""
        made |= {f"{first}{plot}.png": png(picture) for plot, picture in plots(manifest).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in made.items():
            (folder / file).write_bytes(content)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    return list(made)


def _placed(score: "Score", places: Mapping[Path, str]) -> "Score":
    """A score by the name that its checkpoint has on the page."""
    return replace(score, checkpoint=places.get(Path(score.checkpoint).resolve(), score.checkpoint))


def _told(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"checkpoint": str(out), **{part: manifest[part] for part in PARTS if part in manifest}}


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise MalformedFile(f"{path}: not valid JSON: {error}") from None
