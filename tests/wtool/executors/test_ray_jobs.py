"""Commands on a Ray cluster: exit codes, output, needs, and a second run where the first was lost."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray_nodes import ENVIRONMENT, Nodes, nodes

from wtool.executors import ray_jobs
from wtool.executors.ray_jobs import TAIL, Command, run_command


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'wtool[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with nodes(tmp_path_factory.mktemp("nodes")) as started:
            yield started


def python(code: str, **more: object) -> Command:
    return Command((sys.executable, "-c", code), **more)  # type: ignore[arg-type]


def test_a_command_gives_its_code_and_what_it_says(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['WHO']); sys.stderr.write('x' * 30000 + 'end'); sys.exit(7)"
    finished = run_command(python(code, environment={"WHO": "me"}), str(tmp_path))
    assert (finished.code, finished.stdout) == (7, f"{tmp_path} me\n")
    assert finished.stderr == "x" * (TAIL - 3) + "end"
    assert run_command(python("import os; os.kill(os.getpid(), 9)"), str(tmp_path)).code == -9
    missing = run_command(Command(("no-such-program",)), str(tmp_path))
    assert (missing.code, missing.stderr) == (
        127,
        "error: no-such-program: cannot be started: No such file or directory\n",
    )
    assert "no such folder" in run_command(python(""), str(tmp_path / "nowhere")).stderr


def test_a_command_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    inner = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    code = f"from wtool.executors.ray_jobs import *; run_command(Command((sys.executable, '-c', {inner!r})), '/')"
    worker = subprocess.Popen([sys.executable, "-c", code])
    while not mark.exists():
        time.sleep(0.01)
    child = int(Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text())
    worker.kill()
    worker.wait()
    end = time.monotonic() + 10
    while running(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_commands_of_a_lost_worker_are_run_again_and_no_others(cluster: Nodes, tmp_path: Path) -> None:
    """Each leaves a line when it starts; the worker of one is killed while it waits."""
    code = (
        "import os, sys, time, pathlib; mine = pathlib.Path(f'started{sys.argv[1]}')\n"
        "first = not mine.exists(); mine.open('a').write('x')\n"
        "time.sleep(30 if first and sys.argv[1] == '1' else 0); sys.exit(int(sys.argv[1]))"
    )
    commands = [Command((sys.executable, "-c", code, str(number)), memory=10**6) for number in range(4)]

    def strike() -> None:
        while not (tmp_path / "started1").exists():
            time.sleep(0.01)
        time.sleep(2)  # the others are through
        os.kill(cluster.workers("run_command")[0], 9)

    striking = threading.Thread(target=strike)
    striking.start()
    begin = time.monotonic()
    with ray_jobs.cluster(cluster.address, tmp_path) as run, ThreadPoolExecutor(4) as pool:
        finished = list(pool.map(run, commands))
    striking.join()
    assert [each.code for each in finished] == [0, 1, 2, 3]
    assert [(tmp_path / f"started{number}").read_text() for number in range(4)] == ["x", "xx", "x", "x"]
    assert time.monotonic() - begin < 60
