"""GPTQ of one matrix on the processor: wtool beside llm-compressor, in one process, in turn.

    python benchmarks/gptq_loop.py [--rows 1024] [--columns 1024] [--bits 4] [--group-size 128] [--repeat 5]

Runs in an environment that has llmcompressor (0.14.0.1), with this repository's folder in PYTHONPATH. Both get the
same weight, Gram matrix, ordering, damping and symmetric grid, and compute on one thread: wtool from the Gram matrix
to codes and scales, llm-compressor, which is given the scales, to the rounded weight. The floor is LAPACK's Cholesky
factor and the products with the errors of earlier columns, as one matrix product.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from quant.gptq import gptq
from wtool.grid import Grid, Quantized, fit
from wtool.statistics import Gram, relative_errors


def inputs(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.exp(0.8 * torch.randn(columns, generator=generator))
    gram = Gram(columns)
    gram.add(torch.randn(2 * columns, columns, generator=generator) @ mix * size)
    return torch.randn(rows, columns, generator=generator) * 0.02, gram.finish()


def llm_compressor(weight: Tensor, gram: Tensor, grid: Grid) -> Callable[[], Tensor]:
    """Its own function, with the scales that wtool takes where they are positive there."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq import gptq_quantize  # pyright: ignore[reportMissingImports]

    arguments = QuantizationArgs.model_validate(
        {"num_bits": grid.bits, "strategy": "group", "group_size": grid.group_size, "actorder": "weight"}
    )
    scales = fit(weight, grid, dtype=torch.float32)[0].abs()[None]
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    quantize = gptq_quantize.quantize_weight  # it works in the tensors that it gets
    return lambda: quantize(weight[None].clone(), gram[None].clone(), scales, zeros, None, arguments)[0][0]


def floor(weight: Tensor, gram: Tensor) -> Callable[[], None]:
    """One Cholesky factor, and half the multiplications of weight @ gram."""
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    half = gram[: len(gram) // 2].contiguous()
    left = weight[:, : len(gram) // 2].contiguous()

    def run() -> None:
        torch.linalg.cholesky_ex(damped)
        torch.mm(left, half)

    return run


def best_of(runs: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Seconds of processor time of the fastest run of each, in turn, on one thread."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeat):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    """Measure and print; --json writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1024), ("columns", 1024), ("bits", 4), ("group-size", 128), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight, gram = inputs(arguments.rows, arguments.columns)
    grid = Grid(arguments.bits, arguments.group_size)

    def ours() -> Quantized:
        return gptq(weight, gram, grid, scale_dtype=torch.float32).quantized

    theirs = llm_compressor(weight, gram, grid)
    seconds = best_of({"floor": floor(weight, gram), "wtool": ours, "llm-compressor": theirs}, arguments.repeat)
    errors = relative_errors(weight, gram, [ours().values(), theirs()])
    for name, took in seconds.items():
        print(f"{name:15} {took * 1e3:8.1f} ms  {took / seconds['wtool']:6.2f} of wtool's")
    print(f"output error: wtool {errors[0].output:.4f}, llm-compressor {errors[1].output:.4f}")
    record = {
        "seconds": seconds,
        "ratio": seconds["llm-compressor"] / seconds["wtool"],
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "machine": {"processors": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "llmcompressor", "compressed-tensors")},
    }
    print(json.dumps(record["versions"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
