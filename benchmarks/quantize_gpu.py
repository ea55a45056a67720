"""The walk on a GPU: an 8 B llama of random weights, from checkpoint on disk to checkpoint on disk.

    python benchmarks/quantize_gpu.py WORK_FOLDER [--samples 128] [--seqlen 2048] [--layers 32]

Makes the checkpoint and the calibration ids if they are not there, runs `wtool quantize` as a process, and prints one
JSON object: seconds, peak device memory, and the floor of each part by the rates given.

The floor is 2 x weights x tokens for the linears of one forward, 2 x tokens x features^2 for the Gram products of each
distinct input, features^3 / 3 for each Cholesky factor, rows x features^2 for the updates, at 600 TFLOP/s in bfloat16,
15 in float32, and 2 GB/s of disk. For 8 B and 128 x 2048 tokens: one forward 6.3 s, Gram products 7 s, Cholesky 2 s,
updates 1 s, and 22 GB read and written beside them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 128256
TFLOPS, FACTOR_TFLOPS, DISK = 600e12, 15e12, 2e9


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the model."""
    kv = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            found[f"{layer}.{name}.weight"] = shape
    return {**found, "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_model(folder: Path, layers: int) -> None:
    """Random weights of the usual size, in one file a layer."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, torch.Tensor]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map: dict[str, str] = {}
    for name, shape in shapes(layers).items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        made = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device).mul_(0.02)
        files.setdefault(part, {})[name] = made.bfloat16().cpu()
        weight_map[name] = f"model-{part}.safetensors"
        if name.endswith("post_attention_layernorm.weight"):
            save_file(files.pop(part), folder / weight_map[name], {"format": "pt"})
    save_file(files["rest"], folder / "model-rest.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def floor(layers: int, tokens: int) -> dict[str, float]:
    """Seconds that each part takes at the rates of this file."""
    linears = {name: shape for name, shape in shapes(layers).items() if "_proj" in name}
    weights = sum(rows * columns for rows, columns in linears.values())
    inputs = layers * [HIDDEN, HIDDEN, HIDDEN, FFN]
    everything = sum(torch.Size(shape).numel() for shape in shapes(layers).values())
    return {
        "forward": 2 * weights * tokens / TFLOPS,
        "gram": sum(2 * tokens * features**2 for features in inputs) / TFLOPS,
        "factors": sum(features**3 / 3 for features in inputs) / FACTOR_TFLOPS,
        "updates": sum(rows * columns**2 for rows, columns in linears.values()) / (4 * FACTOR_TFLOPS),
        "disk": (2 * everything + 2 * (everything - weights) + weights * 0.53) / DISK,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("more", nargs="*", help="further options of wtool quantize, after --")
    asked = parser.parse_args()
    model, ids, out = (asked.folder / name for name in (f"model-{asked.layers}", "ids.jsonl", "out"))
    make_model(model, asked.layers)
    rows = torch.randint(VOCABULARY, (asked.samples, asked.seqlen), generator=torch.Generator().manual_seed(0))
    ids.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    command = [
        "quantize",
        str(model),
        "--calib",
        str(ids),
        "--samples",
        str(asked.samples),
        "--seqlen",
        str(asked.seqlen),
    ]
    command += ["-o", str(out), "--force", "--json", *asked.more]
    code = (
        "import sys, torch; from wtool.cli import run; code = run(sys.argv[1:]); "
        "peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0; "
        "print('PEAK', peak, file=sys.stderr); sys.exit(code)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stderr)
    peak = int(done.stderr.rpartition("PEAK")[2])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    told = {"device": device, "seconds": round(seconds, 1), "peak_device_bytes": peak}
    told |= {"floor_seconds": {k: round(v, 2) for k, v in floor(asked.layers, asked.samples * asked.seqlen).items()}}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
