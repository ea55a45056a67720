"""Options that several verbs have, so that each is called and explained alike everywhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from wtool.errors import UsageError

if TYPE_CHECKING:
    from wtool.calibrate import Place, Where
    from wtool.calibration_data import Windows
    from wtool.plan import Plan

Calib = Annotated[list[str] | None, typer.Option(help="calibration text: files, datasets of the Hub")]
Samples = Annotated[int | None, typer.Option(min=1, help="calibration windows [default: 128]")]
Seqlen = Annotated[int | None, typer.Option(min=2, help="tokens of a window [default: 2048]")]
Seed = Annotated[int | None, typer.Option(help="of the choice of windows [default: 0]")]
TextColumn = Annotated[str | None, typer.Option(help="the key or column of the text, where it is none of the usual")]
Split = Annotated[str | None, typer.Option(help="of a dataset [default: train]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
ComputeDtype = Annotated[str, typer.Option(help="type to run the model in; auto: the weights', on most CPUs float32")]
Activations = Annotated[str, typer.Option(help="where they wait between blocks: device, cpu or disk")]
BatchTokens = Annotated[int, typer.Option(min=1, help="tokens run at a time")]
Executor = Annotated[str, typer.Option(help="where it is computed: local, ray, or ray:HOST:PORT of a cluster's head")]
Force = Annotated[bool, typer.Option("--force", help="replace the output if it is there")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run the model's own code")]
LowDisk = Annotated[
    bool, typer.Option("--low-disk", help="keep of a model on the Hub only the shards being read, not in the cache")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no remarks")]


def command_of(app: typer.Typer) -> Any:
    """The command of an app, with the option --verbose, which the top level has looked for already."""
    from typer.main import get_command

    extra = typer.Typer(add_completion=False, rich_markup_mode=None)

    @extra.command()
    def _(
        verbose: Annotated[
            bool, typer.Option("--verbose", expose_value=False, help="what happens inside, on stderr")
        ] = False,
    ) -> None: ...

    command = get_command(app)
    known = {name for parameter in command.params for name in parameter.opts}
    command.params += [] if "--verbose" in known else get_command(extra).params
    return command


Sketch = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="like --dry-run, and write there what the output will look like, all but its numbers"
    ),
]


def draw(plan: "Plan", folder: Path | None) -> None:
    """Write the sketch of an output, where one is asked for and can be."""
    if folder is not None and not plan.problems:
        plan.sketch(folder)


def where(device: str, compute_dtype: str, activations: str, batch_tokens: int, trust_remote_code: bool) -> "Where":
    """Where and how fast a walk is to go.

    raises: UsageError
    """
    from wtool.calibrate import Where
    from wtool.dtypes import parse_float_dtype
    from wtool.loading import pick_device

    if activations not in ("device", "cpu", "disk"):
        raise UsageError(f"--activations '{activations}': take device, cpu or disk")
    dtype = None if compute_dtype == "auto" else parse_float_dtype(compute_dtype)
    place = cast("Place", activations)
    return Where(pick_device(device), dtype, place, batch_tokens, trust_remote_code)


def downloads(low_disk: bool, output: Path | None) -> Path | None:
    """Where the shards of models on the Hub are kept while they are read; None is the shared cache."""
    from wtool.writer import DOWNLOADS, work_folder

    return work_folder(output) / DOWNLOADS if low_disk and output else None


def check_low_disk(low_disk: bool, plan: "Plan", executor: str = "local") -> None:
    """Refuse --low-disk where shards would be read more than once.

    raises: UsageError
    """
    if not low_disk:
        return
    if executor != "local":
        raise UsageError(f"--low-disk and --executor {executor}: other machines read shards from the cache; leave one")
    refuse_low_disk(any(step.function is None for step in plan.steps), "a walk through the model")


def refuse_low_disk(asked: bool, work: str) -> None:
    """Refuse --low-disk for work that reads the model more than once.

    raises: UsageError
    """
    if asked:
        raise UsageError(
            "--low-disk is for work that reads each tensor once (merge; rtn and magnitude; methods from --stats); "
            f"{work} reads more: leave it out"
        )


def layers(option: str, text: str) -> int | list[int]:
    """How many layers, or which by their numbers.

    raises: UsageError
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UsageError(f"{option} '{text}': give how many layers (15), or their numbers with commas (0,2,5)")
    return [int(part) for part in parts] if "," in text else int(parts[0])


def tell(windows: "Windows", quiet: bool) -> None:
    """Say on stderr what should be known of the calibration text."""
    from wtool import console

    for warning in windows.warnings:
        console.warn(warning)
    for remark in () if quiet else windows.remarks:
        console.remark(remark)
