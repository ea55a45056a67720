"""`wtool calibrate`: what a model's linears are fed, gathered once for any method to start from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wtool.calibrate import Site
    from wtool.calibration_data import Windows
    from wtool.network import Block, Linear, Network, Read
    from wtool.statistics import Gram
    from wtool.statistics_folder import Input, StatisticsWriter

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
    from wtool.calibrate import Progress, walk, working_dtype
    from wtool.calibrate import network as load
    from wtool.calibration_data import CalibrationSource
    from wtool.calibration_data.for_model import windows_for
    from wtool.checkpoint import open_checkpoint
    from wtool.statistics_folder import StatisticsWriter, identity
    from wtool.writer import is_complete

    begin = time.perf_counter()
    where = options.where(device, compute_dtype, activations, batch_tokens, trust_remote_code)
    checkpoint = open_checkpoint(model)
    asked = CalibrationSource(
        tuple(calib or ()), samples or 128, seqlen or 2048, seed or 0, text_column=text_column, split=split or "train"
    )
    windows = windows_for(checkpoint, asked, trust_remote_code=trust_remote_code)
    options.tell(windows, quiet)
    about = {
        "model": checkpoint.label,
        "model_files": identity(checkpoint),
        "calibration": windows.record,
        "computed_in": where.dtype or working_dtype(checkpoint, where.device),
    }
    fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    if output.exists() and not force and is_complete(output, fingerprint):
        console.emit(f"{output}: there already, of this model and text; nothing to do (--force makes it anew)")
        return
    network = load(checkpoint, where)
    with StatisticsWriter(output, fingerprint, force=force) as writer, ExitStack() as stack:
        visitor = _Saving(writer, network)

        def start(steps: int) -> Progress:
            return stack.enter_context(console.progress("calibrating", steps, quiet=quiet, unit="batches"))

        walk(network, windows.unpadded(), visitor, way="observe", where=where, start=start)
        writer.commit(len(network.blocks), about)
    _tell(output, windows, len(network.blocks), time.perf_counter() - begin, as_json)


class _Saving:
    """The visitor that writes what it is shown, and changes nothing."""

    def __init__(self, writer: "StatisticsWriter", network: "Network"):
        self._writer, self._network = writer, network
        self._grams: dict[Input, Tensor] = {}

    def prepare(self, forward: Any, sites: Any) -> None:
        return None

    def written(self, block: "Block") -> "Read | None":
        return self._network.read if self._writer.has(block.index) else None

    def gather(self, linears: "tuple[Linear, ...]", features: int, device: "torch.device") -> "Gram":
        from wtool.statistics import Gram

        return Gram(features, device)

    def site(self, site: "Site[Gram]") -> "Mapping[Linear, Tensor]":
        from wtool.statistics_folder import Input

        names = tuple(linear.name for linear in site.linears)
        self._grams[Input(names, site.gathered.tokens, site.gathered.dropped)] = site.gathered.finish()
        return {}

    def block(self, block: "Block", unseen: "Sequence[Linear]") -> "Mapping[Linear, Tensor]":
        self._writer.put(block.index, self._grams)
        self._grams = {}
        return {}

    def watched(self, block: "Block") -> "Mapping[str, Callable[..., None]]":
        return {}

    def passed(self, block: "Block", batch: int, before: "Tensor", after: "Tensor") -> None:
        pass


def _tell(output: Path, windows: "Windows", blocks: int, seconds: float, as_json: bool) -> None:
    from wtool.console import emit, emit_json, human_bytes

    size = sum(file.stat().st_size for file in output.iterdir())
    told: dict[str, Any] = {"output": str(output), "blocks": blocks, "tokens": windows.tokens, "bytes": size}
    if as_json:
        emit_json({**told, "seconds": round(seconds, 3)})
    else:
        emit(f"{output}: {blocks} blocks on {windows.tokens:,} tokens, {human_bytes(size)} in {seconds:.1f} s")
