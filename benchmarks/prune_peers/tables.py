"""The results of the benchmark of pruning as markdown tables."""

from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]


def print_tables(record: Record) -> None:
    """All tables that a record has results for."""
    for part in ("sparse", "depth", "width"):
        quality(record, part)
    speed(record)
    parity(record)
    same_layers(record)


def quality(record: Record, part: str) -> None:
    """Perplexity on every text and the mean divergence, by amount and then by the order of the runs."""
    found = {name: each for name, each in record["quality"].items() if name.startswith(f"{part}-")}
    if not found:
        return
    whole = record["quality"]["whole"]
    texts = list(whole["texts"])
    rows = [_quality_row("", "whole model", whole, texts)]
    split = {name: name.removeprefix(f"{part}-").rpartition("-") for name in found}  # method, -, amount
    amounts = list(dict.fromkeys(amount for _, _, amount in split.values()))
    for amount in amounts:
        rows += [_quality_row(amount, split[name][0], found[name], texts) for name in found if split[name][2] == amount]
    _table(f"{part}: perplexity", [part, "method", "parameters", *texts, "mean KL"], rows)


def _quality_row(amount: str, method: str, found: Record, texts: Iterable[str]) -> list[str]:
    each = [found["texts"][text] for text in texts]
    kl = sum(one["kl"] for one in each) / len(each)
    size = f"{found['parameters'] / 1e6:.1f} M"
    return [amount, _words(method), size, *(f"{one['ppl']:.2f}" for one in each), f"{kl:.3f}"]


def speed(record: Record) -> None:
    """Time and memory above the imports: the faster of the rounds, and its ratio to two forwards."""
    best: dict[str, Record] = {}
    for name, usage in record["runs"].items():
        if name.startswith("speed-"):
            kind = name.removeprefix("speed-").rpartition("-")[0]
            best[kind] = min(usage, best.get(kind, usage), key=lambda each: each["seconds"])
    if not best:
        return
    forwards = min(
        (usage["seconds"] for kind, usage in best.items() if kind.startswith("two_forwards")), default=float("nan")
    )
    rows: list[list[str]] = []
    for kind, usage in best.items():
        imports = record["imports"][usage["tool"]]
        above = [usage[key] - imports[key] for key in ("peak_bytes", "peak_anonymous_bytes")]
        times = [f"{usage['seconds']:.1f}", f"{usage['cpu_seconds']:.1f}", f"{usage['seconds'] / forwards:.2f}"]
        rows.append([_words(kind), *times, *(f"{each / 1e6:.0f}" for each in above)])
    heads = ["half of the weights", "wall s", "CPU s", "by two forwards", "resident MB", "anonymous MB"]
    _table("speed, and memory above the imports", heads, rows)


def parity(record: Record) -> None:
    """Where two tools did not drop the same weights."""
    rows: list[list[str]] = []
    for name, found in record["compared"].items():
        if not name.startswith("parity-"):
            continue
        counts: Mapping[str, int] = found["mismatches"]
        first = sum(count for matrix, count in counts.items() if ".layers.0." in matrix)
        hit = [int(matrix.partition(".layers.")[2].partition(".")[0]) for matrix in counts]
        relative: Mapping[str, float] = found["relative_difference"]
        rows.append(
            [
                _words(name.removeprefix("parity-wtool_").replace("-", " ")),
                f"{sum(counts.values()):,} of {found['weights']:,}",
                f"{first:,}",
                str(min(hit)) if hit else "none",
                f"{found['matrices'] - len(counts)} of {found['matrices']}",
                f"{relative['0']:.1e}",
                f"{max(relative.values()):.1e}",
            ]
        )
    heads = [
        "",
        "other masks",
        "in layer 0",
        "first layer with any",
        "matrices without any",
        "weights apart in layer 0",
        "in the worst layer",
    ]
    _table("parity with llm-compressor, all in float32", heads, rows)


def same_layers(record: Record) -> None:
    """Whether mergekit's passthrough of the same layers gives the same tensors."""
    rows: list[list[str]] = []
    for name, found in record["compared"].items():
        if name.startswith("depth-"):
            layers = record["runs"][name]["layers"]
            gone = ", ".join(str(layer) for layer in range(max(layers) + 1) if layer not in layers)
            missing = len(found["not_in_both"])
            rows.append([name.rpartition("-")[2], gone, str(found["differing_tensors"]), str(missing)])
    _table("mergekit's passthrough of wtool's layers", ["layers", "gone", "tensors that differ", "not in both"], rows)


def _words(name: str) -> str:
    """A case's name as a reader likes it."""
    known = {"auto": "in its own type", "llmcompressor": "llm-compressor", "maw": "by weights"}
    return " ".join(known.get(part, part) for part in name.split("_"))


def _table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    if not rows:
        return
    print(f"\n{title}\n")
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")
