"""The command `wtool`: a dict of verbs, each loaded when it is called.

The top level is by hand and imports nothing heavy, so `wtool --help` answers at once.
"""

import atexit
import importlib
import os
import sys
from typing import TYPE_CHECKING

from wtool import __version__, console
from wtool.errors import UsageError, WtoolError, did_you_mean

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130  # the exit code that typer gives to Ctrl-C

# verb -> where its command is, and what it does
VERBS: dict[str, tuple[str, str]] = {
    "merge": ("mergekit_lite.cli:app", "merge checkpoints: soups, SLERP, task arithmetic, TIES, DARE and more"),
    "merge-lora": ("mergekit_lite.lora.cli:merge_app", "combine LoRA adapters without their base: sum, SVD, KnOTS"),
    "extract-lora": ("mergekit_lite.lora.cli:extract_app", "the difference of two checkpoints as a LoRA adapter"),
    "quantize": ("quant.cli:app", "quantize a checkpoint: GPTQ, AWQ or rounding, for transformers, vLLM, llama.cpp"),
    "prune": ("prune.cli:app", "make a checkpoint smaller or sparse: depth, width, experts, weights, rank"),
    "distill": ("distill.cli:app", "train a student to say what its teacher says"),
    "teacher-cache": ("distill.cli:cache_app", "keep what a teacher says of a text, for students to come"),
    "run": ("wtool.commands.run:app", "run a pipeline of stages from a file, or what is left of it"),
    "calibrate": ("wtool.commands.calibrate:app", "gather statistics once, for any quantization to start from"),
    "inspect": ("wtool.commands.inspect:app", "what a checkpoint holds: tensors, types, sizes, configuration"),
    "diff": ("wtool.commands.diff:app", "how far two checkpoints are apart, tensor by tensor"),
    "eval": ("wtool.commands.eval:app", "perplexity on a text, and divergence from a reference model"),
    "barrier": (
        "mergekit_lite.soups.barrier_cli:app",
        "the loss on the way between models: one basin, and where it is best",
    ),
    "report": ("wtool.commands.report:app", "a page that tells what was done to a checkpoint"),
    "push": ("wtool.commands.push:app", "upload a checkpoint with its card to the Hub, private unless told otherwise"),
    "schema": ("wtool.commands.schema:app", "the JSON schema of a verb's recipe, from which editors complete"),
    "doctor": ("wtool.commands.doctor:app", "versions, devices, room, what is missing and how to mend it"),
    "demo": ("wtool.commands.demo:app", "merge two small trained experts and show what it did"),
}


def help_text() -> str:
    """What `wtool --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    return (
        f"wtool {__version__}: merge, quantize, prune and distil Hugging Face checkpoints\n\n"
        f"usage: wtool VERB …\n\n{verbs}\n\n"
        "A checkpoint is a folder, a weights file (safetensors, .bin, .gguf), a Hub id (org/name, org/name@revision),\n"
        "or any of these with LoRA adapters: base+adapter.\n\n"
        "wtool VERB --help tells a verb's options."
    )


def load(verb: str) -> "typer.Typer":
    """Import a verb's command.

    raises: UsageError for an unknown verb
    """
    if verb not in VERBS:
        raise UsageError(f"no verb '{verb}'{did_you_mean(verb, VERBS)} (there are {', '.join(VERBS)})")
    module, attribute = VERBS[verb][0].split(":")
    return getattr(importlib.import_module(module), attribute)


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code.

    With --json an error is told on stdout too, unless a result was: {"error": the line, "exit_code": the code}.
    """
    console.json_told = 0
    try:
        if not arguments or arguments[0].startswith("-") or arguments[0] == "help":
            return _without_verb(arguments)
        with console.log_shown("debug" if "--verbose" in arguments else os.environ.get("WTOOL_LOG")):
            code = _run_verb(*arguments)
            return _failed("stopped", INTERRUPTED, arguments) if code == INTERRUPTED else code
    except WtoolError as error:
        return _failed(f"error: {error}", error.exit_code, arguments)
    except Exception as error:
        if hasattr(error, "format_message"):
            told = error.format_message()  # type: ignore[attr-defined]
            return _failed(f"error: {told} (wtool {arguments[0]} --help)", 2, arguments)
        if type(error).__name__ in ("Abort", "Exit"):
            return getattr(error, "exit_code", 1)
        _tell_scripts(f"{type(error).__name__}: {error}", 1, arguments)
        raise


def _without_verb(arguments: list[str]) -> int:
    """What can be asked of the tool itself."""
    flag, *rest = arguments or ["--help"]
    if flag in ("--help", "-h", "help"):
        print(help_text())
    elif flag == "--version":
        print(f"wtool {__version__}")
    elif flag in ("--show-completion", "--install-completion", "--complete"):
        from wtool import completion

        print(completion.answer(flag, rest, VERBS, load), end="")
    else:
        raise UsageError(f"no option '{flag}' (wtool --help)")
    return 0


def _run_verb(verb: str, *rest: str) -> int:
    app = load(verb)
    from wtool.options import command_of

    command = command_of(app)
    with console.log_whole(verb):
        code = command.main(args=list(rest), prog_name=f"wtool {verb}", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _failed(line: str, code: int, arguments: list[str]) -> int:
    """Tell an error, on stderr and to scripts."""
    print(line, file=sys.stderr)
    _tell_scripts(line.removeprefix("error: "), code, arguments)
    return code


def _tell_scripts(message: str, code: int, arguments: list[str]) -> None:
    if "--json" in arguments and not console.json_told:
        console.emit_json({"error": message, "exit_code": code})


def main() -> None:
    """The entry point.

    Leaves without taking the interpreter apart, which with torch loaded takes half a second; what is registered to be
    done at the end (temporary folders removed) is done.
    """
    code = run(sys.argv[1:])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
