"""Quantization without calibration of a checkpoint shaped as Llama 3 70B: time, peak memory, and the floor.

    python benchmarks/no_calibration.py FOLDER [--layers 6] [--runs int4,fp8-dynamic] [--filled 1] [--json RESULTS]

A layer has 855,654,400 weights (width 8,192, feed-forward 28,672, 64 heads of which 8 are of keys), embedding and
head 1,050,673,152 each, in bfloat16. Memory depends on the largest matrices, not on how many layers there are, and 80
need 141 GB: so a run takes as many layers as the disk has room for, and the plan of all 80 is made besides. Files of
the layers that are not `--filled` with random weights are sparse: they read as zeros, without the disk. Each run is a
process of `wtool quantize`, looked at every 20 ms. Its own memory is what `/proc` calls anonymous; what is resident has
mapped pages of the input in it, which the system takes away when it needs them. The floor is reading the input and
writing as many bytes as the output has, by one plain loop.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy

WIDTH, INNER, KEYS, WORDS, DEPTH = 8192, 28672, 1024, 128256, 80
RUNS = {
    "int4": ["--method", "rtn", "--bits", "4"],
    "int4-no-clip": ["--method", "rtn", "--bits", "4", "--no-clip"],
    "int4-gptq": ["--method", "rtn", "--bits", "4", "--format", "gptq"],
    "int3-asym": ["--method", "rtn", "--bits", "3", "--asymmetric"],
    "fp8-dynamic": ["--scheme", "fp8-dynamic"],
    "fp8-block": ["--scheme", "fp8-block"],
    "fp8-tensor": ["--scheme", "fp8-tensor"],
}
LAYER = {
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], filled: bool) -> None:
    """A safetensors file of bfloat16 tensors: random normal numbers, or a hole."""
    entries, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(numpy.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # as every writer does, so that tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        if filled:
            rng = numpy.random.default_rng(0)
            block = (rng.standard_normal(1 << 24, dtype=numpy.float32) * 0.02).view(numpy.uint32) >> 16
            data = block.astype(numpy.uint16).tobytes()
            for begin in range(0, position, len(data)):
                file.write(data[: position - begin])
        file.truncate(8 + len(header) + position)


def make(folder: Path, layers: int, filled: int) -> Path:
    """A checkpoint of so many layers."""
    folder.mkdir(parents=True)
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH), "lm_head.weight": (WORDS, WIDTH)}
    parts = [{**ends, "model.norm.weight": (WIDTH,)}]
    parts += [{f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()} for i in range(layers)]
    weight_map = {}
    for i, shapes in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / name, shapes, 0 < i <= filled)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    config |= {"hidden_size": WIDTH, "intermediate_size": INNER, "vocab_size": WORDS, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; seconds, and the most memory in MB, its own and with mapped files."""
    begin, own, held = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            told = {line.split(":")[0]: line.split() for line in lines}
            own, held = max(own, int(told["RssAnon"][1])), max(held, int(told["VmRSS"][1]))
        except (OSError, KeyError, IndexError):
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 1), "own_mb": own * 1024 // 10**6, "resident_mb": held * 1024 // 10**6}


def floor(source: Path, nbytes: int, scratch: Path) -> float:
    """Seconds to read the input and to write so many bytes."""
    begin, block = time.perf_counter(), bytearray(1 << 24)
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    with scratch.open("wb") as file:
        for start in range(0, nbytes, len(block)):
            file.write(block[: nbytes - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    scratch.unlink()
    return round(seconds, 1)


def run(name: str, source: Path, whole: Path, folder: Path) -> dict[str, Any]:
    wtool, out = [sys.executable, "-m", "wtool", "quantize"], folder / "out"
    plan = measure([*wtool, str(whole), *RUNS[name], "--dry-run", "--json"])
    told: dict[str, Any] = measure([*wtool, str(source), *RUNS[name], "-o", str(out), "--quiet"])
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    told |= {"output_gb": round(nbytes / 1e9, 2), "floor_seconds": floor(source, nbytes, folder / "scratch")}
    return told | {"plan_of_80_layers": plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--filled", type=int, default=1, help="layers of random weights, the rest are zeros")
    parser.add_argument("--runs", default="int4,fp8-dynamic,fp8-block")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    source = make(asked.folder / "source", asked.layers, asked.filled)
    whole = make(asked.folder / "whole", DEPTH, 0)
    results = {"layers": asked.layers, "filled": asked.filled, "processors": os.cpu_count(), "runs": {}}
    for name in asked.runs.split(","):
        results["runs"][name] = run(name, source, whole, asked.folder)
        print(name, json.dumps(results["runs"][name]), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(asked.folder)


if __name__ == "__main__":
    main()
