"""`wtool barrier`: the loss on the straight line between models, and what that tells of merging them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import options
from wtool.errors import UsageError

if TYPE_CHECKING:
    from wtool.evaluate import Evaluation

    from .barrier_walk import Walked
    from .held_out import HeldOut

log = logging.getLogger("wtool.barrier")  # under the logger that --verbose shows
app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
Every point is what `wtool merge A B -w 1-t -w t` would write, and is measured as `wtool eval` measures it; nothing is
written. It takes the memory of one model. The barrier is the largest height of the loss above the line between the
ends' losses, in nats a token: up to 0.02 is one basin, above 0.1 the models are in different ones.
Of more than two models every pair is measured. Several texts count alike, however long they are."""


@app.command("barrier", epilog=EPILOG)
def barrier(
    models: Annotated[list[str], typer.Argument(metavar="A B …", help="checkpoints of one architecture")],
    text: Annotated[list[Path], typer.Option(help="a held-out text in UTF-8; several count alike")],
    points: Annotated[int, typer.Option(min=3, help="on each line, its ends among them")] = 11,
    base: Annotated[str | None, typer.Option(help="a checkpoint to measure beside them")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="a picture: .svg, .png or .html")] = None,
    window: Annotated[int, typer.Option(min=1, help="tokens the model sees at once")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="tokens to the next window [default: half of it]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="windows at a time [default: 1, on a GPU 8]")] = None,
    limit_tokens: Annotated[int | None, typer.Option(min=1, help="score at most so many tokens of a text")] = None,
    device: options.Device = "auto",
    compute_dtype: options.ComputeDtype = "auto",
    ignore_tokenizers: Annotated[bool, typer.Option("--ignore-tokenizers", help="go on with unlike ones")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The loss on the straight line between models: whether they share a basin, and where a merge is best."""
    if len(models) < 2:
        raise UsageError(f"a line has two ends: give two checkpoints or more; {len(models)} is given")
    from wtool import console

    from .barrier_walk import alone, evaluations, plan_all, walk
    from .held_out import How, check_stride, held_out, read_texts

    check_stride(window, stride)
    if plot:
        from .barrier_plot import check_kind

        check_kind(plot)
    texts = read_texts(text)
    plan = plan_all([*models, *([base] if base else [])], ignore_tokenizers=ignore_tokenizers)
    dtype = None if compute_dtype == "auto" else compute_dtype
    held = held_out(plan, texts, How(window, stride, limit_tokens, batch, device, dtype, trust_remote_code))
    if not quiet:
        for warning in plan.warnings:
            console.warn(warning)
        if held.window < window:
            console.remark(f"the window is {held.window} tokens, not {window}: the model has no more positions")
    total = (evaluations(len(models), points) + bool(base)) * held.scored
    with console.progress("measuring", total, quiet=quiet, unit="tokens") as advance:
        told = {"progress": advance, "ignore_tokenizers": ignore_tokenizers}
        beside = alone(base, held, **told) if base else None
        lines = walk(models, held, points=points, tell=log.debug, **told)
    if as_json:
        console.emit_json(_result(models, held, lines, base, beside))
    else:
        _print(models, held, lines, base, beside)
    if plot:
        from .barrier_plot import save

        save(plot, [(models[each.first], models[each.second], each.line) for each in lines], ", ".join(held.texts))


def _print(
    models: Sequence[str],
    held: "HeldOut",
    lines: "Sequence[Walked]",
    base: str | None,
    beside: "tuple[Evaluation, ...] | None",
) -> None:
    from wtool.console import emit, table
    from wtool.dtypes import config_name

    from .barrier import matrix
    from .held_out import mean_loss, perplexity

    where = f"{config_name(held.dtype)} on {held.device}, windows of {held.window} tokens"
    emit(f"{', '.join(held.texts)}: {held.scored:,} tokens, {where}")
    for each in lines:
        _print_line(models[each.first], models[each.second], each, list(held.texts))
    if base and beside:
        loss = mean_loss([one.nats_per_token for one in beside])
        emit(f"the base {base}: {loss:.4f} nats a token, perplexity {perplexity(loss):.4f}")
    if len(models) > 2:
        heights = matrix(len(models), [(each.first, each.second, each.line.barrier) for each in lines])
        rows = [
            [name, *("" if height is None else f"{height:.4f}" for height in row)]
            for name, row in zip(models, heights, strict=True)
        ]
        table("barriers, nats a token", ["", *models], rows)


def _print_line(first: str, second: str, walked: "Walked", texts: Sequence[str]) -> None:
    from wtool.console import emit, table

    from .barrier import reading
    from .held_out import perplexity

    line = walked.line
    columns = [f"t ({first} → {second})", "nats a token", "above the line", "perplexity"]
    columns += texts if len(texts) > 1 else []
    rows = [
        [
            f"{share:.3g}",
            f"{loss:.4f}",
            f"{height:+.4f}",
            f"{perplexity(loss):.4f}",
            *(f"{one.perplexity:.4f}" for one in found if len(texts) > 1),
        ]
        for share, loss, height, found in zip(line.shares, line.losses, line.heights, walked.points, strict=True)
    ]
    table(None, columns, rows, best=line.lowest)
    for sentence in reading(line, first, second):
        emit(sentence)


def _result(
    models: Sequence[str],
    held: "HeldOut",
    lines: "Sequence[Walked]",
    base: str | None,
    beside: "tuple[Evaluation, ...] | None",
) -> dict[str, Any]:
    return {
        "models": list(models),
        **held.record(),
        "tokens": held.scored,
        "base": {"checkpoint": base, "texts": [asdict(each) for each in beside]} if beside else None,
        "lines": [_line(models, list(held.texts), each) for each in lines],
    }


def _line(models: Sequence[str], texts: Sequence[str], walked: "Walked") -> dict[str, Any]:
    from .barrier import kind, reading

    first, second, line = models[walked.first], models[walked.second], walked.line
    named = {text: walked.of_text(number) for number, text in enumerate(texts)}
    return {
        "first": first,
        "second": second,
        "barrier": line.barrier,
        "barrier_at": line.shares[line.top],
        "rise_over_mean": line.rise,
        "kind": kind(line),
        "best": line.shares[line.lowest],
        "gain": line.gain,
        "reading": reading(line, first, second),
        "texts": {text: {"barrier": each.barrier, "best": each.shares[each.lowest]} for text, each in named.items()},
        "points": [
            {
                "t": share,
                "nats_per_token": loss,
                "above": height,
                "texts": {text: asdict(one) for text, one in zip(texts, found, strict=True)},
            }
            for share, loss, height, found in zip(line.shares, line.losses, line.heights, walked.points, strict=True)
        ],
    }
