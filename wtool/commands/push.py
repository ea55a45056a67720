"""`wtool push`: a folder and its card to a repository on the Hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import console, options
from wtool.errors import MissingInput, UnfinishedWork, UsageError

if TYPE_CHECKING:
    from wtool.checkpoint.hub_push import Contents, Pushed

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
The repository is made where it is not there. What goes: weights, configuration, tokenizer, the model's own code, the
manifest wtool.json and the card; the folder itself is not changed. Weights in the repository that the new ones replace
are deleted in the same upload; GGUF files stay. The token is that of all Hugging Face tools: HF_TOKEN, or `hf auth
login`. An upload that was stopped goes on when the same command is run again."""


@app.command(epilog=EPILOG)
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what wtool made")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="where it goes")],
    public: Annotated[bool, typer.Option("--public", help="for everybody to see [default: private]")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to push to, made if need be [default: main]")] = None,
    figures: Annotated[
        list[Path] | None, typer.Option(help="what `wtool eval --json` printed, for the card; once a file")
    ] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show files, sizes and the card; ask nothing")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Upload a checkpoint to the Hub, with a card that tells how it was made; private unless told otherwise."""
    from wtool import __version__, card
    from wtool.checkpoint.hub_errors import progress_bars
    from wtool.checkpoint.hub_push import contents, upload
    from wtool.checkpoint.resolve import is_hub_id

    if not is_hub_id(repository) or "@" in repository:
        raise UsageError(f"'{repository}': give the repository as ORG/NAME (a branch with --revision)")
    found = contents(_finished(folder))
    manifest = card.read_manifest(folder)
    measured = [card.read_figures(path) for path in figures or []]
    written = folder / "README.md"
    text = card.completed(
        written.read_text(encoding="utf-8") if written.is_file() else None,
        manifest,
        measured,
        repository.partition("/")[2],
    )
    warnings = [*_unaccounted(folder, manifest), *_left(found)]
    for warning in warnings:
        console.warn(warning)
    if dry_run:
        _show(found, text, repository, public, warnings, as_json)
        return
    message = message or f"{folder.name}, made with wtool {__version__}"
    with progress_bars(shown=not quiet and sys.stderr.isatty()):
        done = upload(folder, list(found.files), text, repository, branch=revision, public=public, message=message)
    _tell(found, done, repository, public, warnings, as_json)


def _finished(folder: Path) -> Path:
    """The folder, if it is one and whole.

    raises: MissingInput, UnfinishedWork
    """
    from wtool.writer import work_folder

    work, above = work_folder(folder), folder.resolve().parent.name
    if not folder.exists() and not work.is_dir():
        raise MissingInput(f"{folder}: no such folder")
    if work.is_dir() or (above.startswith(".") and above.endswith(".wtool")):
        raise UnfinishedWork(f"{folder}: is not finished: run the command that makes it again, it goes on where it was")
    if not folder.is_dir():
        raise MissingInput(f"{folder}: a file; give the folder that wtool made")
    return folder


def _unaccounted(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What in the folder wtool cannot account for.

    raises: InputError where the weights are damaged or not whole
    """
    from wtool.checkpoint.folder import open_local
    from wtool.checkpoint.made import made_as

    is_adapter = (folder / "adapter_config.json").is_file()
    checkpoint = None if is_adapter else open_local(folder, str(folder))
    if not manifest:
        return [f"{folder}: has no wtool.json: how it was made is not known, and the card does not tell it"]
    told = manifest.get("tensors_xxh3")
    if checkpoint and told and not any(folder.glob("*.gguf")) and set(told) != set(checkpoint.tensors):
        return [f"{folder}: holds other tensors than its wtool.json tells of: changed after wtool made it"]
    if told and made_as(folder, list(folder.iterdir())) is None:
        return [f"{folder}: its weights are newer than its wtool.json: changed after wtool made it, or copied"]
    return []


def _left(found: "Contents") -> list[str]:
    return [f"not uploaded, as it belongs to no checkpoint: {', '.join(found.left)}"] if found.left else []


def _show(found: "Contents", card: str, repository: str, public: bool, warnings: list[str], as_json: bool) -> None:
    """What would be uploaded."""
    size = sum(found.files.values())
    if as_json:
        console.emit_json(
            {
                "repository": repository,
                "private": not public,
                "files": dict(found.files),
                "bytes": size,
                "card": card,
                "warnings": warnings,
            }
        )
        return
    seen = "everybody" if public else "you and your organization"
    console.emit(f"{repository}: {len(found.files)} files, {console.human_bytes(size)}, for {seen} to see")
    for name, nbytes in found.files.items():
        console.emit(f"  {name}  {console.human_bytes(nbytes)}")
    console.emit(f"the card:\n\n{card}")


def _tell(found: "Contents", done: "Pushed", repository: str, public: bool, warnings: list[str], as_json: bool) -> None:
    size = sum(found.files.values())
    if public and done.private:
        warnings = [
            *warnings,
            f"{repository} was there and is private; it stays so (its settings on the Hub change it)",
        ]
        console.warn(warnings[-1])
    if as_json:
        console.emit_json(
            {
                "repository": repository,
                "url": done.url,
                "commit": done.commit,
                "private": done.private,
                "files": dict(found.files),
                "bytes": size,
                "deleted": list(done.deleted),
                "warnings": warnings,
            }
        )
        return
    gone = f", {len(done.deleted)} older weights file(s) deleted" if done.deleted else ""
    console.emit(
        f"{done.url}: {len(found.files)} files, {console.human_bytes(size)}{gone}; "
        f"{'private' if done.private else 'public'}, commit {done.commit[:12]}"
    )
