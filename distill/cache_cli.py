"""`wtool teacher-cache`: what a teacher says of a text, kept for students to come."""

from pathlib import Path
from typing import Annotated

import typer

from wtool import options

cache_app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
`wtool distill CACHE STUDENT` learns from it. Of each distribution the k likeliest tokens are kept and the mass of all
others (--mode top-k), or a sample of k tokens whose mean is the distribution (--mode sample: for forward KL alone, and
nearest to the teacher there).
A stopped run goes on where it was when the same command is run again."""


@cache_app.command(epilog=EPILOG)
def teacher_cache(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="checkpoint")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="tokens kept of each distribution")] = 32,
    mode: Annotated[str, typer.Option(help="top-k or sample")] = "top-k",
    temperature: Annotated[float, typer.Option(min=0.01, help="that students will be trained at")] = 1.0,
    data: Annotated[list[str] | None, typer.Option(help="text: files, datasets of the Hub")] = None,
    samples: Annotated[int, typer.Option(min=1, help="windows of text")] = 1024,
    seqlen: Annotated[int, typer.Option(min=2, help="tokens of a window")] = 1024,
    seed: options.Seed = None,
    text_column: options.TextColumn = None,
    split: options.Split = None,
    stream: Annotated[bool, typer.Option("--stream", help="one block of the teacher in memory at a time")] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="run at a time [default: 2048, streamed 16384]")
    ] = None,
    device: options.Device = "auto",
    compute_dtype: options.ComputeDtype = "auto",
    force: options.Force = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Keep what a teacher says of a text, for students to come."""
    import time

    from wtool import console
    from wtool.calibrate import working_dtype
    from wtool.calibration_data import CalibrationSource
    from wtool.calibration_data.for_model import windows_for
    from wtool.checkpoint import open_checkpoint
    from wtool.dtypes import parse_float_dtype
    from wtool.errors import UsageError
    from wtool.loading import pick_device
    from wtool.writer import is_complete

    from .signal_cache import CacheWriter, fingerprint
    from .teacher_cache import Signals, about, kind_of, make_teacher, write_signals

    if mode not in ("top-k", "sample"):
        raise UsageError(f"--mode '{mode}': take top-k or sample")
    begin = time.perf_counter()
    device = pick_device(device)
    checkpoint = open_checkpoint(teacher)
    asked = Signals(mode, top_k, temperature, seed or 0)
    source = CalibrationSource(
        tuple(data or ()), samples, seqlen, seed or 0, text_column=text_column, split=split or "train"
    )
    windows = windows_for(checkpoint, source, trust_remote_code=trust_remote_code)
    options.tell(windows, quiet)
    dtype = working_dtype(checkpoint, device) if compute_dtype == "auto" else parse_float_dtype(compute_dtype)
    told = about(checkpoint, windows, asked, dtype=dtype, trust_remote_code=trust_remote_code)
    tokens, kind = windows.unpadded(), kind_of(checkpoint, asked)
    if output.exists() and not force and is_complete(output, fingerprint(told, tokens, kind)):
        console.emit(f"{output}: there already, of this teacher and text; nothing to do (--force makes it anew)")
        return
    speaker = make_teacher(checkpoint, dtype=dtype, device=device, stream=stream, trust_remote_code=trust_remote_code)
    with (
        CacheWriter(output, told, windows=tokens, **vars(kind), force=force) as writer,
        console.progress("listening", len(tokens), quiet=quiet, unit="windows") as progress,
    ):
        at_once = batch_tokens or (16384 if stream else 2048)
        write_signals(speaker, tokens, writer, asked, device=device, batch_tokens=at_once, progress=progress)
        writer.commit()
    _tell(output, kind.bytes_per_token, windows.tokens, time.perf_counter() - begin, as_json)


def _tell(output: Path, each: int, tokens: int, seconds: float, as_json: bool) -> None:
    from wtool.console import emit, emit_json, human_bytes

    size = sum(path.stat().st_size for path in output.iterdir())
    if as_json:
        return emit_json(
            {"output": str(output), "tokens": tokens, "bytes": size, "bytes_per_token": each, "seconds": seconds}
        )
    emit(f"{output}: {tokens:,} tokens, {human_bytes(size)}, {each} bytes a token, in {seconds:.1f} s")
