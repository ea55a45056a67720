"""wtool against mergekit on a 1.1 B-parameter llama: two fine-tunes and their base, bfloat16, four shards each.

    python benchmarks/merge.py --mergekit PATH/TO/mergekit-yaml [--methods linear,ties] [--repeat 1]

Needs 16 GB of disk and memory to keep the inputs in the page cache. Both tools run as whole processes, one after
the other, with warm caches; time, processor time and peak memory (anonymous: mapped input files are left out) are
those of the process. The floor is reading the inputs and writing an output of the same size, with cat.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
SHARDS = 4
MODELS = ("base", "a", "b")
_BOTH = "models: [{model: FIRST}, {model: SECOND}]\n"
RECIPES = {
    "linear": "merge_method: linear\nparameters: {weight: 0.5}\n" + _BOTH,
    "slerp": "merge_method: slerp\nbase_model: FIRST\nparameters: {t: 0.3}\n" + _BOTH,
    "ties": "merge_method: ties\nbase_model: BASE\nparameters: {weight: 0.5, density: 0.5}\n" + _BOTH,
    "dare_ties": "merge_method: dare_ties\nbase_model: BASE\nparameters: {weight: 0.5, density: 0.5}\n" + _BOTH,
}


@dataclass(frozen=True)
class Usage:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    peak_anonymous_bytes: int


def make_models(folder: Path) -> None:
    """Write the three checkpoints, unless they are there."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names = list(shapes)
    shards = [names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS] for i in range(SHARDS)]
    for model in MODELS:
        if (folder / model / "model.safetensors.index.json").exists():
            continue
        (folder / model).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder / model)
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, 1):
            filename = f"model-{i:05}-of-{SHARDS:05}.safetensors"
            tensors = {name: _weights(name, shapes[name], model) for name in shard}
            save_file(tensors, folder / model / filename, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, filename)
        total = 2 * sum(shape.numel() for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights(name: str, shape: "torch.Size", model: str) -> "torch.Tensor":
    import torch

    base = torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name)))) * 0.02
    if model != "base":
        seed = 1000 + sum(map(ord, name)) + MODELS.index(model)
        base += torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.001
    return base.bfloat16()


def measure(command: list[str], environment: dict[str, str] | None = None) -> Usage:
    """Run a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *found])
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(seconds, cpu, peak * 1024)


def measure_floor(folder: Path) -> dict[str, Usage]:
    """Reading the inputs of a merge of two and writing one output, and what starting up takes."""
    every_input = sorted(str(path) for path in folder.glob("*/*.safetensors") if path.parent.name in MODELS)
    subprocess.run(["cat", *every_input], stdout=subprocess.DEVNULL, check=True)
    inputs = sorted(str(path) for model in ("a", "b") for path in (folder / model).glob("*.safetensors"))
    out = folder / "floor"
    copy = f"cat {' '.join(inputs)} > /dev/null; cat {' '.join(inputs[: len(inputs) // 2])} > {out}"
    found = {
        "cat": measure(["sh", "-c", copy]),
        "cat and sync": measure(["sh", "-c", f"{copy}; sync {out}"]),
        "import torch": measure([sys.executable, "-c", "import torch"]),
        "wtool --help": measure([sys.executable, "-m", "wtool", "--help"]),
    }
    out.unlink()
    return found


def measure_method(folder: Path, method: str, mergekit: str | None, repeat: int) -> dict[str, Usage]:
    """The best of some runs of each tool, in turn."""
    recipe, out = folder / f"{method}.yml", folder / "out"
    text = RECIPES[method]
    for placeholder, model in (("BASE", "base"), ("FIRST", "a"), ("SECOND", "b")):
        text = text.replace(placeholder, str(folder / model))
    recipe.write_text(text)
    tools = {"wtool": [sys.executable, "-m", "wtool", "merge", str(recipe), "-o", str(out)]}
    if mergekit:
        tools["mergekit"] = [mergekit, str(recipe), str(out), "--quiet"]
    best: dict[str, Usage] = {}
    for _ in range(repeat):
        for tool, command in tools.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            usage = measure(command, {"HF_HUB_OFFLINE": "1"})
            best[tool] = min(usage, best.get(tool, usage), key=lambda u: u.seconds)
    shutil.rmtree(out, ignore_errors=True)
    return best


def _figures(usage: Usage) -> str:
    return f"{usage.seconds:8.2f} {usage.cpu_seconds:8.2f} {usage.peak_anonymous_bytes / 1e6:8.0f}"


def _ratio(ours: Usage, theirs: Usage) -> str:
    smaller = theirs.peak_anonymous_bytes / ours.peak_anonymous_bytes
    return f"{theirs.seconds / ours.seconds:.1f}x faster, {smaller:.1f}x smaller"


def main() -> None:
    """Measure and print a table; --json writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-merge"), help="for the models and outputs")
    parser.add_argument("--mergekit", help="the mergekit-yaml program; without it only wtool is measured")
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--repeat", type=int, default=1, help="the best of so many runs of each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    make_models(folder)
    results: dict[str, dict[str, Usage]] = {"floor": measure_floor(folder)}
    for name, usage in results["floor"].items():
        print(f"{name:20} {_figures(usage)}")
    print(f"\n{'method':10} {'tool':9} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}   wtool is")
    for method in arguments.methods.split(","):
        best = results[method] = measure_method(folder, method, arguments.mergekit, arguments.repeat)
        for tool, usage in best.items():
            print(f"{method:10} {tool:9} {_figures(usage)}   {_ratio(best['wtool'], usage) if tool != 'wtool' else ''}")
    if arguments.json:
        record = {
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "machine": {"processors": len(os.sched_getaffinity(0)), "platform": platform.platform()},
            "versions": {name: version(name) for name in ("torch", "safetensors")} | {"mergekit": "0.1.5"},
            "python": platform.python_version(),
            **{name: {tool: asdict(usage) for tool, usage in found.items()} for name, found in results.items()},
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
