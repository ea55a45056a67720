"""A Ray cluster of several nodes on this machine, each with processes of its own, for tests."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(str(folder) for folder in (Path(__file__).parents[1], Path(__file__).parent)),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


class Nodes:
    """A head and one more node, on loopback."""

    def __init__(self, folder: Path):
        self.address = f"127.0.0.1:{_free_port()}"
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self.start("--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false")
        self.start(f"--address={self.address}")

    def start(self, *arguments: str) -> None:
        """Start a node with one processor, and wait until it is there."""
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
        limits = ["--num-cpus=1", "--object-store-memory=80000000", "--memory=2000000000", "--disable-usage-stats"]
        log = self._folder / f"node{len(self._processes)}.log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*ray, "start", *arguments, *limits, "--node-ip-address=127.0.0.1", "--block"],
                env={**os.environ, **ENVIRONMENT},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self._processes.append(process)
        while b"--block" not in log.read_bytes():  # "... This command will now block forever until terminated"
            if process.poll() is not None:
                raise RuntimeError(log.read_text())

    def kill(self, number: int) -> None:
        """End all processes of a node at once, as a power cut does: they are of one session."""
        session = self._processes[number].pid
        for process in _processes():
            with suppress(ProcessLookupError):
                if os.getsid(process) == session:
                    os.kill(process, signal.SIGKILL)
        self._processes[number].wait()

    def workers(self, title: str) -> list[int]:
        """The processes of this cluster that carry out a task of some name."""
        sessions = [process.pid for process in self._processes]
        found = []
        for process in _processes():
            with suppress(OSError):
                busy = Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::" + title.encode())
                if busy and os.getsid(process) in sessions:
                    found.append(process)
        return found

    def stop(self) -> None:
        for number in reversed(range(len(self._processes))):
            self.kill(number)


@contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    """A cluster of two nodes, for a while."""
    cluster = Nodes(folder)
    try:
        yield cluster
    finally:
        cluster.stop()


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
