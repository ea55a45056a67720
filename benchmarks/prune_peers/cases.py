"""What the benchmark of pruning runs: a case is one process that writes one folder.

The parts are generators of cases; a case's name starts with its part's, and its folder has that name.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent
SHARES = ("0.3", "0.5", "0.7")
AMOUNTS = (*SHARES, "2:4")
OWL_SHARES = ("0.5", "0.7")
METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
DEPTHS = (0.9, 0.8, 2 / 3)  # shares of the layers to keep
DEPTH_SCORES = ("perplexity", "block-influence", "angular", "last")
FFN_CUTS = (0.15, 0.30)
EXACT = ("--compute-dtype", "float32", "--batch-tokens", "512")  # windows one by one, as the peer has them


@dataclass(frozen=True)
class Case:
    """One process, and the folder that it writes."""

    name: str
    tool: str
    command: tuple[str, ...]  # arguments of the tool's python


@dataclass(frozen=True)
class Bench:
    """What the benchmark was asked."""

    model: Path
    texts: tuple[Path, ...]
    calib: Path
    folder: Path
    results: Path
    pythons: dict[str, str]  # of the tools that there are
    cases: str = ""  # a pattern of the names of those to run

    def out(self, name: str) -> Path:
        return self.folder / name

    def text(self) -> tuple[str, ...]:
        """The options that name the calibration tokens."""
        rows = [json.loads(line)["input_ids"] for line in self.calib.read_text().splitlines()]
        return "--calib", str(self.calib), "--samples", str(len(rows)), "--seqlen", str(max(map(len, rows)))

    def wtool(self, name: str, *options: str, model: Path | None = None, verb: str = "prune") -> Case:
        """A case of wtool, on the calibration tokens unless it needs none."""
        needless = "--stats" in options or ("magnitude" in options and "owl" not in options)
        start = ("-m", "wtool", verb, str(model or self.model), *options, *(() if needless else self.text()))
        return Case(name, "wtool", (*start, "-o", str(self.out(name)), "--json", "--quiet"))

    def peer(self, name: str, tool: str, script: str, *options: str, model: Path | None = None) -> Case:
        """A case of a script beside this one: MODEL OUT IDS and what it is told."""
        places = (str(model or self.model), str(self.out(name)), str(self.calib))
        return Case(name, tool, (str(PEERS / script), *places, *options))

    def config(self) -> dict[str, Any]:
        return json.loads((self.model / "config.json").read_text())

    def save(self, record: Mapping[str, Any]) -> None:
        self.results.write_text(json.dumps(record, indent=1) + "\n")


def sparse(bench: Bench) -> Iterator[Case]:
    """Every method at every amount, with OWL's shares where they can be had, and llm-compressor's."""
    for method, amount in product(METHODS, AMOUNTS):
        yield bench.wtool(f"sparse-{method}-{amount}", *_method(method, amount), *_blocks(method))
    for method, amount in product(METHODS, OWL_SHARES):
        options = (*_blocks(method), "--layer-ratios", "owl")
        yield bench.wtool(f"sparse-{method}+owl-{amount}", *_method(method, amount), *options)
    for method in ("wanda", "sparsegpt"):
        yield bench.wtool(f"sparse-{method}+sequential-0.5", *_method(method, "0.5"))
    for method, amount in product(("wanda", "sparsegpt"), AMOUNTS):
        name = f"sparse-llmcompressor_{method}-{amount}"
        yield bench.peer(name, "llmcompressor", "run_llmcompressor.py", method, amount)


def _method(method: str, amount: str) -> tuple[str, ...]:
    return "-m", method, "--pattern" if ":" in amount else "--sparsity", amount


def _blocks(method: str) -> tuple[str, ...]:
    """All linears of a block fitted to what the block is fed, as papers and llm-compressor do."""
    return () if method == "magnitude" else ("--no-sequential",)


def parity(bench: Bench) -> Iterator[Case]:
    """The same matrices by both tools, everything in float32.

    `fed`: every layer sees what the pruned ones before it make of the text, so one weight that is chosen otherwise
    changes all layers after it. `dense`: every layer sees the whole model's inputs. Tokens count alike, as there.
    """
    exact, statistics = bench.out("float32"), "parity-statistics"
    if not exact.exists():
        subprocess.run([sys.executable, str(PEERS / "as_float32.py"), str(bench.model), str(exact)], check=True)
    yield bench.wtool(statistics, *EXACT, model=exact, verb="calibrate")
    own = {"fed": (*EXACT, "--no-sequential", "--no-lift"), "dense": ("--stats", str(bench.out(statistics)))}
    for method, amount, inputs in product(("wanda", "sparsegpt"), ("0.5", "2:4"), own):
        yield bench.wtool(
            f"parity-wtool_{method}_{inputs}-{amount}", *_method(method, amount), *own[inputs], model=exact
        )
        settings = (method, amount, "float32", "sequential" if inputs == "fed" else "basic")
        name = f"parity-llmcompressor_{method}_{inputs}-{amount}"
        yield bench.peer(name, "llmcompressor", "run_llmcompressor.py", *settings, model=exact)


def speed(bench: Bench) -> Iterator[Case]:
    """Two rounds in turn; of each the faster one counts."""
    for turn in ("1", "2"):
        for dtype in ("float32", "auto"):
            yield bench.peer(f"speed-two_forwards_{dtype}-{turn}", "wtool", "forwards.py", dtype)
        for method in ("wanda", "sparsegpt"):
            yield bench.wtool(f"speed-wtool_{method}-{turn}", *_method(method, "0.5"), *_blocks(method))
            yield bench.wtool(f"speed-wtool_{method}+sequential-{turn}", *_method(method, "0.5"))
            for dtype in ("auto", "float32"):
                name = f"speed-llmcompressor_{method}_{dtype}-{turn}"
                yield bench.peer(name, "llmcompressor", "run_llmcompressor.py", method, "0.5", dtype)


def depth(bench: Bench) -> Iterator[Case]:
    """Every score at every depth; optipfair's; and mergekit with the layers that wtool chose by default."""
    layers = bench.config()["num_hidden_layers"]
    for keep in (min(round(share * layers), layers - 1) for share in DEPTHS):
        for score in DEPTH_SCORES:
            yield bench.wtool(f"depth-{score}-{keep}", "--layers", str(keep), "--depth-score", score)
        for kind in ("importance", "last"):
            name = f"depth-optipfair_{kind}-{keep}"
            yield bench.peer(name, "optipfair", "run_optipfair.py", kind, str(layers - keep))
        ours = str(bench.out(f"depth-perplexity-{keep}"))
        name = f"depth-mergekit_passthrough-{keep}"
        yield Case(name, "mergekit", (str(PEERS / "run_mergekit.py"), str(bench.model), str(bench.out(name)), ours))


def width(bench: Bench) -> Iterator[Case]:
    """Fewer channels in the feed-forward blocks, fitted to the whole model's outputs and only cut; and optipfair's."""
    channels = bench.config()["intermediate_size"]
    for cut in FFN_CUTS:
        keep = str(channels - int(cut * channels))  # as optipfair rounds
        yield bench.wtool(f"width-fitted-{keep}", "--ffn", keep)
        yield bench.wtool(f"width-only_cut-{keep}", "--ffn", keep, "--no-compensate")
        for kind in ("maw", "hybrid"):
            yield bench.peer(f"width-optipfair_{kind}-{keep}", "optipfair", "run_optipfair.py", kind, str(cut))


PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "sparse": sparse,
    "parity": parity,
    "speed": speed,
    "depth": depth,
    "width": width,
}
