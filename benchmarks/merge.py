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
from pathlib import Path

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
SHARDS = 4
MODELS = ("base", "a", "b")
RECIPES = {
    "linear": "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: A}, {model: B}]\n",
    "slerp": "merge_method: slerp\nbase_model: A\nparameters: {t: 0.3}\nmodels: [{model: A}, {model: B}]\n",
    "ties": (
        "merge_method: ties\nbase_model: BASE\nparameters: {weight: 0.5, density: 0.5}\n"
        "models: [{model: A}, {model: B}]\n"
    ),
    "dare_ties": (
        "merge_method: dare_ties\nbase_model: BASE\nparameters: {weight: 0.5, density: 0.5}\n"
        "models: [{model: A}, {model: B}]\n"
    ),
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


def _weights(name: str, shape: "torch.Size", model: str) -> "torch.Tensor":  # noqa: F821
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
    inputs = sorted(str(path) for model in ("a", "b") for path in (folder / model).glob("*.safetensors"))
    every_input = sorted(str(path) for path in folder.glob("*/*.safetensors") if path.parent.name in MODELS)
    subprocess.run(["cat", *every_input], stdout=subprocess.DEVNULL, check=True)
    out = folder / "out"
    copy = f"cat {' '.join(inputs)} > /dev/null; cat {' '.join(inputs[: len(inputs) // 2])} > {out}"
    results: dict[str, dict[str, object]] = {
        "floor": {
            "cat": asdict(measure(["sh", "-c", copy])),
            "cat and sync": asdict(measure(["sh", "-c", copy + f"; sync {out}"])),
        },
        "start": {
            "import torch": asdict(measure([sys.executable, "-c", "import torch"])),
            "wtool --help": asdict(measure([sys.executable, "-m", "wtool", "--help"])),
        },
    }
    out.unlink()
    for name, figures in [*results["floor"].items(), *results["start"].items()]:
        print(f"{name:14} {figures['seconds']:7.2f} s")  # type: ignore[index]
    print(f"{'method':10} {'tool':9} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}   wtool is")
    for method in arguments.methods.split(","):
        recipe = folder / f"{method}.yml"
        recipe.write_text(
            RECIPES[method]
            .replace("BASE", str(folder / "base"))
            .replace("A}", f"{folder / 'a'}}}")
            .replace(": A\n", f": {folder / 'a'}\n")
            .replace("B}", f"{folder / 'b'}}}")
        )
        tools = {"wtool": [sys.executable, "-m", "wtool", "merge", str(recipe), "-o", str(out)]}
        if arguments.mergekit:
            tools["mergekit"] = [arguments.mergekit, str(recipe), str(out), "--quiet"]
        best: dict[str, Usage] = {}
        for _ in range(arguments.repeat):
            for tool, command in tools.items():
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                usage = measure(command, {"HF_HUB_OFFLINE": "1"})
                best[tool] = min(usage, best.get(tool, usage), key=lambda u: u.seconds)
        shutil.rmtree(out, ignore_errors=True)
        results[method] = {tool: asdict(usage) for tool, usage in best.items()}
        for tool, usage in best.items():
            ratio = ""
            if tool == "mergekit":
                ours = best["wtool"]
                ratio = (
                    f"{usage.seconds / ours.seconds:.1f}x faster, "
                    f"{usage.peak_anonymous_bytes / ours.peak_anonymous_bytes:.1f}x smaller"
                )
            print(
                f"{method:10} {tool:9} {usage.seconds:8.2f} {usage.cpu_seconds:8.2f} {usage.peak_anonymous_bytes / 1e6:8.0f}   {ratio}"
            )
    if arguments.json:
        machine = {
            "processors": len(os.sched_getaffinity(0)),
            "platform": platform.platform(),
            "python": platform.python_version(),
        }
        arguments.json.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
