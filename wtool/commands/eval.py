"""`wtool eval`: perplexity on texts, and divergence from a reference model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wtool.errors import InputError, Mismatch, MissingInput, RuntimeProblem, UsageError
from wtool.text_file import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from wtool.checkpoint import Checkpoint
    from wtool.evaluate import Evaluation

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
Each token is scored once; with a stride below the window, every token beyond the first window has at least
window - stride tokens before it. Where the tokenizer puts a BOS in front of a text, every window begins with one.
KL is the mean over tokens of KL(reference || model), in nats. Numbers are to be compared with those of the same
tokenizer, window and stride only."""


@app.command("eval", epilog=EPILOG)
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="the model to evaluate")],
    text: Annotated[list[Path], typer.Option(help="a text file in UTF-8; several give a row each")],
    reference: Annotated[str | None, typer.Option(help="a checkpoint to measure the divergence from")] = None,
    window: Annotated[int, typer.Option(min=1, help="tokens the model sees at once")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="tokens to the next window [default: half of it]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="windows at a time [default: 1, on a GPU 8]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, …; auto: the weights', on a CPU float32")] = "auto",
    limit_tokens: Annotated[int | None, typer.Option(min=1, help="score at most so many tokens of a text")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the model's own code")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no remarks")] = False,
) -> None:
    """Perplexity of a model on texts, and how far it is from a reference model."""
    if stride and stride > window:
        raise UsageError(f"--stride {stride} is beyond --window {window}: the tokens between would not be scored")
    texts = {path: read_text(path) for path in text}
    from wtool import console
    from wtool.checkpoint import open_checkpoint
    from wtool.dtypes import config_name, parse_float_dtype
    from wtool.evaluate import encode
    from wtool.evaluate import evaluate as score
    from wtool.loading import load_model, pick_device, working_dtype

    device = pick_device(device)
    asked = None if dtype == "auto" else parse_float_dtype(dtype)
    checkpoints = [open_checkpoint(name) for name in (checkpoint, reference) if name is not None]
    tokenizer = _tokenizer(checkpoints, texts, trust_remote_code, quiet)
    types = [asked or working_dtype(each, device) for each in checkpoints]
    models = [
        load_model(each, dtype=kind, device=device, trust_remote_code=trust_remote_code)
        for each, kind in zip(checkpoints, types, strict=True)
    ]
    results: dict[Path, Evaluation] = {}
    for path, content in texts.items():
        total = min(len(encode(tokenizer, content)[0]) - 1, limit_tokens or len(content))
        with console.progress(path.name, total, quiet=quiet, unit="tokens") as advance:
            try:
                results[path] = score(
                    models[0],
                    tokenizer,
                    content,
                    window=window,
                    stride=stride,
                    reference=models[1] if reference else None,
                    batch=batch or (8 if device.startswith("cuda") else 1),
                    limit=limit_tokens,
                    progress=advance,
                )
            except InputError as error:
                raise type(error)(f"{path}: {error}") from None
    cut = next(iter(results.values())).window
    if cut < window and not quiet:
        console.remark(f"the window is {cut} tokens, not {window}: the model has no more positions")
    names = [config_name(kind) for kind in types]
    if as_json:
        about = {"checkpoint": checkpoint, "reference": reference, "device": device, "dtype": names[0]}
        about |= {"reference_dtype": names[1]} if reference else {}
        console.emit_json({**about, "texts": [{"file": str(path), **asdict(each)} for path, each in results.items()]})
    else:
        _print(checkpoint, reference, f"{' and '.join(dict.fromkeys(names))} on {device}", results)
    _refuse_nonfinite(checkpoint, results)


def _tokenizer(
    checkpoints: "list[Checkpoint]", texts: dict[Path, str], trust_remote_code: bool, quiet: bool
) -> "PreTrainedTokenizerBase":
    """The tokenizer of the models, which must be one.

    raises: Mismatch where the model's and the reference's differ, MissingInput where none of them has one
    """
    from wtool.console import remark
    from wtool.evaluate import tokenizers_differ
    from wtool.loading import load_tokenizer

    found: list[PreTrainedTokenizerBase] = []
    lacking: list[MissingInput] = []
    for each in checkpoints:
        try:
            found.append(load_tokenizer(each, trust_remote_code=trust_remote_code))
        except MissingInput as error:
            lacking.append(error)
    if not found:
        raise lacking[0]
    if lacking and not quiet:
        remark(f"{lacking[0]}; that of the other model is taken")
    for path, content in texts.items() if len(found) > 1 else ():
        if what := tokenizers_differ(found[0], found[1], content):
            labels = " and ".join(each.label for each in checkpoints)
            raise Mismatch(f"the tokenizers of {labels} differ on {path}: {what}; their predictions cannot be compared")
    return found[0]


def _print(checkpoint: str, reference: str | None, where: str, results: "dict[Path, Evaluation]") -> None:
    from wtool.console import emit, table

    any_result = next(iter(results.values()))
    bos = "a BOS in front of each window" if any_result.bos else "no BOS"
    emit(f"{checkpoint}: {where}, windows of {any_result.window} tokens, stride {any_result.stride}, {bos}")
    if reference:
        emit(f"reference: {reference}")
    columns = ["text", "perplexity", "tokens", "windows"]
    columns += ["reference's", "KL (nats)", "top-1 agreement"] if reference else []
    table(None, columns, [_cells(path, result) for path, result in results.items()])


def _cells(path: Path, result: "Evaluation") -> list[str]:
    cells = [str(path), f"{result.perplexity:.4f}", f"{result.tokens:,}", f"{result.windows:,}"]
    if result.reference_perplexity is None:
        return cells
    return [*cells, f"{result.reference_perplexity:.4f}", f"{result.divergence:.3g}", f"{result.agreement:.2%}"]


def _refuse_nonfinite(checkpoint: str, results: "dict[Path, Evaluation]") -> None:
    for path, result in results.items():
        if result.nonfinite:
            share = f"{result.nonfinite:,} of {result.tokens:,} tokens of {path}"
            raise RuntimeProblem(
                f"{checkpoint}: gives {share} the probability NaN or 0: weights that are not finite "
                "(wtool diff counts them), or an overflow (try --dtype float32)"
            )
