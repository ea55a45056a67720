"""The results of the benchmark of distillation as markdown tables."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from distill_peers.cases import WAYS

Record = Mapping[str, Any]
COSTS = ["tokens/s", "wall s", "resident MB", "anonymous MB"]


def print_tables(record: Record) -> None:
    """All tables that a record has results for."""
    for part in ("losses", "cache"):
        quality(record, part)
    judged(record)
    signals(record)
    beside_trl(record)
    killed(record)


def quality(record: Record, part: str) -> None:
    """What is left of the teacher after a training: divergence and perplexity on every text."""
    rows: list[list[str]] = []
    for student in record["students"]:
        found = [name for name in _trained(record, student) if name.startswith(f"{part}-")]
        if part == "cache" and found:
            found = [name for name in (f"losses-forward_kl-{student}",) if name in record["runs"]] + found
        if found:
            rows.append([student, "before", "", *_held_out(record, student), *[""] * len(COSTS)])
        for name in found:
            how = "online" if part == "cache" and name.startswith("losses-") else _words(name, part, student)
            kept = str(record["runs"][name]["figures"]["best_step"])
            rows.append([student, how, kept, *_held_out(record, name), *_costs(record, name)])
    if rows and "whole" in record["quality"]:
        rows.insert(0, ["", "teacher", "", *_held_out(record, "whole"), *[""] * len(COSTS)])
    texts = [f"{text}: KL, perplexity" for text in record["surroundings"]["command"]["texts"]]
    _table(f"{part}: {_length(record)}", ["student", part, "kept step", *texts, "mean KL", *COSTS], rows)


def judged(record: Record) -> None:
    """The KL by which wtool itself judged, on windows held out of the training text."""
    rows: list[list[str]] = []
    steps: list[str] = []
    for student in record["students"]:
        for name in (name for name in _trained(record, student) if name.startswith("losses-")):
            entries = record["runs"][name]["figures"]["evaluation"]
            steps = [f"step {entry['step']}" for entry in entries]
            rows.append([student, _words(name, "losses", student), *(f"{entry['kl']:.4f}" for entry in entries)])
    _table("KL over the training, on windows of the training's text", ["student", "loss", *steps], rows)


def signals(record: Record) -> None:
    """What a cache takes, and the time it is made in."""
    rows: list[list[str]] = []
    for name, run in record["runs"].items():
        if name.startswith("signals-"):
            told = run["figures"]
            sizes = (f"{told['bytes_per_token']}", f"{run['disk_bytes'] / told['tokens']:.1f}")
            rate = told["tokens"] / told["seconds"]
            rows.append([_words(name, "signals", ""), *sizes, f"{rate:.0f}", *_costs(record, name)[1:]])
    heads = ["cache", "bytes a token", "with all else in the folder", *COSTS]
    _table("the teacher's cache", heads, rows)


def beside_trl(record: Record) -> None:
    """wtool and TRL: the faster turn of each, and how far their losses are apart at any step."""
    for name, way in product(record["students"], WAYS):
        student = f"{name}-float32"
        rows: list[list[str]] = []
        losses: dict[str, list[float]] = {}
        for tool in ("wtool", "trl"):
            turns = [
                name for name in record["runs"] if name.startswith(f"trl-{tool}{way}-") and name.endswith(f"-{student}")
            ]
            if not turns:
                break
            best = max(turns, key=lambda name: record["runs"][name]["figures"]["tokens_per_second"])
            losses[tool] = step_losses(record["runs"][best]["figures"])
            ends = [f"{losses[tool][place]:.4f}" for place in (0, -1)]
            rows.append([tool, *_costs(record, best), *ends, *_held_out(record, best)])
        if len(rows) == 2:
            texts = [f"{text}: KL, perplexity" for text in record["surroundings"]["command"]["texts"]]
            rows.append(["before", *[""] * (len(COSTS) + 2), *_held_out(record, name)])
            heads = ["", *COSTS, "first step's loss", "last", *texts, "mean KL"]
            _table(f"beside TRL{way}, {student}", heads, [*rows, _ratios(rows[:2])])
            pairs = zip(*losses.values(), strict=True)
            print(f"\nlargest relative difference of a step's loss: {max(abs(a - b) / b for a, b in pairs):.1e}")


def killed(record: Record) -> None:
    """Whether two kills changed the weights."""
    if found := record.get("kill"):
        same = "equal" if found["equal"] else "DIFFERENT"
        print(f"\nkilled {len(found['kills'])} times in {found['steps']} steps: weights {same}, {found['sha256']}")
        for what, left in found["kills"].items():
            print(f"- {what}: {', '.join(left)}")


def step_losses(figures: Record) -> list[float]:
    """Of every step, whichever tool told them."""
    return figures["losses"] if "losses" in figures else [entry["loss"] for entry in figures["training"]]


def _ratios(rows: list[list[str]]) -> list[str]:
    """The first row by the second, in the columns of costs."""
    ours, theirs = ([float(cell.replace(",", "")) for cell in row[1 : 1 + len(COSTS)]] for row in rows)
    return ["wtool / trl", *(f"{a / b:.2f}" for a, b in zip(ours, theirs, strict=True))] + [""] * (len(rows[0]) - 5)


def _trained(record: Record, student: str) -> Iterator[str]:
    return (name for name in record["runs"] if name.endswith(f"-{student}") and name in record["quality"])


def _held_out(record: Record, name: str) -> list[str]:
    """Divergence and perplexity on every text, and the mean divergence; empty where it was not measured."""
    texts = record["surroundings"]["command"]["texts"]
    if name not in record["quality"]:
        return [""] * (len(texts) + 1)
    each = [record["quality"][name]["texts"][text] for text in texts]
    mean = sum(one["kl"] for one in each) / len(each)
    return [*(f"{one['kl']:.4f}, {one['ppl']:.2f}" for one in each), f"{mean:.4f}"]


def _costs(record: Record, name: str) -> list[str]:
    """Tokens a second in training as the tool tells, the whole process's time, and its memory above the imports."""
    run = record["runs"][name]
    imports = record["imports"][run["tool"]]
    above = [run[key] - imports[key] for key in ("peak_bytes", "peak_anonymous_bytes")]
    rate = run["figures"].get("tokens_per_second") or 0.0
    return [f"{rate:.0f}", f"{run['seconds']:.1f}", *(f"{each / 1e6:,.0f}" for each in above)]


def _length(record: Record) -> str:
    asked = record["settings"]
    return f"{asked['steps']} steps of {asked['batch']} x {asked['seqlen']} tokens"


def _words(name: str, part: str, student: str) -> str:
    """A case's name as a reader likes it."""
    return name.removeprefix(f"{part}-").removesuffix(f"-{student}").replace("_", " ")


def _table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    if not rows:
        return
    print(f"\n{title}\n")
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")
