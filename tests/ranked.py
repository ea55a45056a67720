"""A command of wtool in several processes, as torchrun starts them, forked from a server that has all imported."""

import multiprocessing
import os
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

from killing import PRELOADED


def start(command: list[str], said: Path, *, size: int = 2, fault: str = "none") -> list[BaseProcess]:
    """Start a command in some processes.

    said: a folder, where each process leaves what it prints: out0, err0, out1, …
    fault: what happens to the second process: "none", "fails" or "dies" on its third matrix
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes: list[BaseProcess] = []
    for rank in range(size):
        process = context.Process(target=_run, args=(command, said, rank, size, port, fault if rank == 1 else "none"))
        process.start()
        processes.append(process)
    return processes


def _run(command: list[str], said: Path, rank: int, size: int, port: int, fault: str) -> None:
    from wtool.cli import run

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    if fault != "none":
        _spoil(fault)
    try:
        code = run(command)
    except SystemExit as end:
        code = end.code
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _spoil(fault: str) -> None:
    """Have the third matrix of this process fail."""
    import quant.calibrated
    from wtool.errors import RuntimeProblem

    works, calls = quant.calibrated.by_rows, []

    def fails(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            if fault == "dies":
                os._exit(9)
            raise RuntimeProblem("the third matrix is bad here")
        return works(*arguments)

    quant.calibrated.by_rows = fails
