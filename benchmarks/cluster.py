"""A merge on a Ray cluster of 1, 2 and 4 workers beside the same merge on 1, 2 and 4 threads of one process.

    python benchmarks/cluster.py [--layers 12] [--methods linear,ties] [--workers 1,2,4] [--repeat 3] [--json FILE]

Two fine-tunes and their base, bfloat16, 0.4 GB each, are merged into files of 50 MB. Every figure is the best of some
runs of the whole command, with warm page cache; outputs are compared byte by byte. A worker is a Ray task with one
processor of Ray's count, which is not a processor of the machine: on fewer processors than workers (this prints how
many there are) more workers only show what they cost. The `start` row is a merge of almost nothing: what it takes to
connect, to start the workers, and to import torch in them, which a real work of minutes hides.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

HIDDEN, FFN = 1024, 4096
MODELS = ("base", "a", "b")
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def make_models(folder: Path, layers: int) -> None:
    """Write the three checkpoints: noise around a common base."""
    import torch
    from safetensors.torch import save_file

    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
    for number, model in enumerate(MODELS):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(layers):
            common = torch.Generator().manual_seed(layer)
            own = torch.Generator().manual_seed(1000 * number + layer)
            for name, shape in shapes.items():
                value = 0.02 * torch.randn(shape, generator=common)
                value += 0.001 * number * torch.randn(shape, generator=own)
                tensors[f"model.layers.{layer}.{name}.weight"] = value.bfloat16()
        (folder / model).mkdir(parents=True)
        save_file(tensors, folder / model / "model.safetensors")


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[str]:
    """A Ray cluster on this machine for a while; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", f"--num-cpus={workers}", "--block"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
    log = folder / "ray.log"
    with log.open("wb") as said:
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
        process = subprocess.Popen([*ray, *start, *quiet], env=ENVIRONMENT, stdout=said, stderr=said)
    try:
        while b"--block" not in log.read_bytes():
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def seconds(folder: Path, method: str, where: list[str], repeat: int) -> tuple[float, str]:
    """The best time of some runs of a merge, and what tells its output from any other."""
    out, best, told = folder / "out", float("inf"), ""
    more = {"linear": ["-w", "0.5"], "ties": ["-w", "0.5", "--density", "0.5", "--base", "base"], "start": ["-w", "1"]}
    inputs = ["tiny"] if method == "start" else ["a", "b"]
    name = "linear" if method == "start" else method
    command = [sys.executable, "-m", "wtool", "merge", *inputs, "-m", name, *more[method], "--shard-size", "50MB"]
    for _ in range(repeat):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        begin = time.perf_counter()
        done = subprocess.run([*command, "-o", "out", "-q", *where], cwd=folder, env=ENVIRONMENT, capture_output=True)
        best = min(best, time.perf_counter() - begin)
        if done.returncode:
            raise SystemExit(done.stderr.decode())
        files = (file.name.encode() + file.read_bytes() for file in sorted(out.iterdir()))
        told = hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).hexdigest()
    return best, told


def measure(folder: Path, methods: list[str], counts: list[int], repeat: int) -> dict[str, dict[str, float]]:
    """Seconds of every method: `threads N` and `ray N`."""
    found: dict[str, dict[str, float]] = {method: {} for method in methods}
    outputs: dict[str, set[str]] = {method: set() for method in methods}
    for count in counts:
        for method in methods:
            found[method][f"threads {count}"], told = seconds(folder, method, ["--workers", str(count)], repeat)
            outputs[method].add(told)
        with cluster(count, folder) as address:
            for method in methods:
                found[method][f"ray {count}"], told = seconds(folder, method, ["--executor", f"ray:{address}"], repeat)
                outputs[method].add(told)
    unlike = [method for method, told in outputs.items() if len(told) > 1]
    if unlike:
        raise SystemExit(f"the outputs of {', '.join(unlike)} are not the same bytes everywhere")
    return found


def main() -> None:
    """Measure and print a table; --json writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of each model, 34 MB a layer")
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many runs of each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.workers.split(",")]
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as name:
        folder = Path(name)
        make_models(folder, arguments.layers)
        (folder / "tiny").mkdir()
        save_tiny(folder / "tiny")
        found = measure(folder, ["start", *arguments.methods.split(",")], counts, arguments.repeat)
    columns = [f"{kind} {count}" for kind in ("threads", "ray") for count in counts]
    print(f"{len(os.sched_getaffinity(0))} processors; seconds of the whole command, all outputs the same bytes")
    print(f"{'':8}" + "".join(f"{column:>11}" for column in columns))
    for method, times in found.items():
        print(f"{method:8}" + "".join(f"{times[column]:11.2f}" for column in columns))
    if arguments.json:
        record = {
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "machine": {"processors": len(os.sched_getaffinity(0)), "platform": platform.platform()},
            "versions": {name: version(name) for name in ("torch", "ray")},
            "bytes_a_model": 2 * arguments.layers * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN),
            "seconds": found,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def save_tiny(folder: Path) -> None:
    """Write a checkpoint of one number."""
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")


if __name__ == "__main__":
    main()
