"""The command `wtool`: a dict of verbs, each loaded when it is called.

The top level is by hand and imports nothing heavy, so `wtool --help` answers at once.
"""

import atexit
import importlib
import os
import sys
from typing import TYPE_CHECKING

from wtool import __version__
from wtool.errors import UsageError, WtoolError, did_you_mean

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130  # the exit code that typer gives to Ctrl-C

# verb -> where its command is, and what it does
VERBS: dict[str, tuple[str, str]] = {
    "merge": ("mergekit_lite.cli:app", "merge checkpoints: soups, SLERP, task arithmetic, TIES, DARE"),
    "quantize": ("quant.cli:app", "quantize a checkpoint: GPTQ, or rounding alone"),
    "prune": ("prune.cli:app", "make a checkpoint smaller or sparse: depth, width, experts, weights, rank"),
    "distill": ("distill.cli:app", "train a student to say what its teacher says"),
    "teacher-cache": ("distill.cli:cache_app", "keep what a teacher says of a text, for students to come"),
    "calibrate": ("wtool.commands.calibrate:app", "gather statistics once, for any quantization to start from"),
    "inspect": ("wtool.commands.inspect:app", "what a checkpoint holds: tensors, types, sizes, configuration"),
    "diff": ("wtool.commands.diff:app", "how far two checkpoints are apart, tensor by tensor"),
    "eval": ("wtool.commands.eval:app", "perplexity on a text, and divergence from a reference model"),
    "report": ("wtool.commands.report:app", "a page that tells what was done to a checkpoint"),
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
    """Run the command line; returns the exit code."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        print(f"wtool {__version__}")
        return 0
    verb, *rest = arguments
    try:
        code = load(verb)(args=rest, prog_name=f"wtool {verb}", standalone_mode=False)
        if code == INTERRUPTED:
            print("stopped", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except WtoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if _is_usage(error):
            print(f"error: {error.format_message()} (wtool {verb} --help)", file=sys.stderr)  # type: ignore[attr-defined]
            return 2
        if type(error).__name__ in ("Abort", "Exit"):
            return getattr(error, "exit_code", 1)
        raise


def _is_usage(error: Exception) -> bool:
    return hasattr(error, "format_message")


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
