"""`wtool calibrate`: what a model's linears are fed, gathered once for any method to start from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError

if TYPE_CHECKING:
    from wtool.calibrate import Progress
    from wtool.calibration_data import Windows

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
The model runs as it is, so methods that start from these statistics do not see what quantizing earlier layers does to
later ones, as `wtool quantize` on text does. A stopped calibration goes on where it was."""


@app.command(epilog=EPILOG)
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint to run")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder to write")] = None,
    calib: options.Calib = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    device: options.Device = "auto",
    compute_dtype: options.ComputeDtype = "auto",
    activations: options.Activations = "device",
    batch_tokens: options.BatchTokens = 2048,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="of outputs too, for `wtool quantize --bits 3.5 --stats`")
    ] = False,
    lift: Annotated[
        bool, typer.Option("--lift", help="count short tokens like longer ones, as `wtool quantize` does on text")
    ] = False,
    force: options.Force = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Gather the statistics of a model's inputs on calibration text, streamed block by block."""
    if output is None:
        raise UsageError("where to? give the output folder with -o OUT")
    import time
    from contextlib import ExitStack

    from wtool import console
    from wtool.calibration_data import CalibrationSource
    from wtool.calibration_data.for_model import windows_for
    from wtool.checkpoint import open_checkpoint
    from wtool.statistics_walk import gather

    begin = time.perf_counter()
    where = options.where(device, compute_dtype, activations, batch_tokens, trust_remote_code)
    checkpoint = open_checkpoint(model)
    asked = CalibrationSource(
        tuple(calib or ()), samples or 128, seqlen or 2048, seed or 0, text_column=text_column, split=split or "train"
    )
    windows = windows_for(checkpoint, asked, trust_remote_code=trust_remote_code)
    options.tell(windows, quiet)
    with ExitStack() as stack:

        def start(steps: int) -> "Progress":
            stack.close()  # what is shown of the walk before
            return stack.enter_context(console.progress("calibrating", steps, quiet=quiet, unit="batches"))

        done = gather(
            checkpoint, windows, output, where=where, gradients=gradients, lifted=lift, force=force, start=start
        )
    if done.already_there:
        console.emit(f"{output}: there already, of this model and text; nothing to do (--force makes it anew)")
        return
    _tell(output, windows, done.blocks, time.perf_counter() - begin, as_json)


def _tell(output: Path, windows: "Windows", blocks: int, seconds: float, as_json: bool) -> None:
    from wtool.console import emit, emit_json, human_bytes

    size = sum(file.stat().st_size for file in output.iterdir())
    told: dict[str, Any] = {"output": str(output), "blocks": blocks, "tokens": windows.tokens, "bytes": size}
    if as_json:
        emit_json({**told, "seconds": round(seconds, 3)})
    else:
        emit(f"{output}: {blocks} blocks on {windows.tokens:,} tokens, {human_bytes(size)} in {seconds:.1f} s")
