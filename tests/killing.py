"""Commands in processes of their own that a test can kill, forked with everything imported from a clean server.

A process that has computed with several threads must not be forked, so the server only imports.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = [
    "wtool.calibrate",
    "wtool.evaluate",
    "quant.calibrated",
    "quant.cli",
    "prune.job",
    "prune.structural",
    "distill.run",
    "distill.cli",
    "compressed_tensors",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
]


def start(command: list[str]) -> BaseProcess:
    """Run a command of wtool in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(command,))
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _run(command: list[str]) -> None:
    from wtool.cli import run

    os._exit(run([*command, "--quiet"]))
