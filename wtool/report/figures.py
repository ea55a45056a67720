"""The figures of a manifest's report, whatever of them is there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median
from typing import Any

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a module's name that is a number
_USUAL = "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj".split()  # as they are run


@dataclass(frozen=True)
class Linear:
    """What the report tells of a linear; None where it does not."""

    module: str
    weight_error: float | None = None  # ||changed - original|| / ||original||, Frobenius
    output_error: float | None = None  # the same of the layer's output on the calibration tokens
    rtn_output_error: float | None = None  # what rounding to the nearest code would have made of it
    cut_output_error: float | None = None  # what cutting without a fit of the rest would have made of it
    sparsity: float | None = None  # share of the weights that are 0, in [0, 1]
    rank: int | None = None
    damping: float | None = None
    fallback: str | None = None
    tokens: int | None = None
    bits: int | None = None
    group_size: int | None = None
    moved: float | None = None  # merges: ||model - base|| / ||base||, the root of the mean square over the models
    change: float | None = None  # merges: ||merged - base|| / ||base||
    untouched: float | None = None  # merges: of the weights that a model moved the share left at the base, in [0, 1]
    kept: float | None = None  # merges: how far it is along the way from the base to what it is before it is rounded
    conflict: float | None = None  # merges: share of the weights on whose sign the task vectors disagree, in [0, 1]
    cosine: float | None = None  # merges: the mean over the pairs of task vectors, in [-1, 1]

    @property
    def error(self) -> float | None:
        """Of the output where that is known, else of the weight."""
        return self.weight_error if self.output_error is None else self.output_error

    @property
    def gain(self) -> float | None:
        """The share of the plain way's error (rounding, cutting) that is gone, at most 1; negative where it grew."""
        plain = self.rtn_output_error or self.cut_output_error
        return None if self.output_error is None or not plain else 1 - self.output_error / plain


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another."""

    name: str  # what stands before the block's number: "model.layers"
    blocks: tuple[int, ...]
    places: tuple[str, ...]  # of a linear in its block, other numbers (an expert's) as *
    cells: Mapping[tuple[int, str], tuple[Linear, ...]]  # by block and place


def linears(manifest: Mapping[str, Any]) -> list[Linear]:
    """Every linear of the report."""
    report = manifest.get("report")
    found = report if isinstance(report, Mapping) else {}
    return [_linear(str(module), entry) for module, entry in found.items() if isinstance(entry, Mapping)]


def stacks(found: Sequence[Linear]) -> tuple[list[Stack], list[Linear]]:
    """The linears by block and place, and those that are in no block."""
    cells: dict[str, dict[tuple[int, str], list[Linear]]] = {}
    outside: list[Linear] = []
    for each in found:
        if (number := _NUMBER.search(each.module)) is None:
            outside.append(each)
            continue
        name = each.module[: number.start()].strip(".")
        place = _NUMBER.sub("*", each.module[number.end() :].strip("."))
        cells.setdefault(name, {}).setdefault((int(number[0]), place), []).append(each)
    return [_stack(name, theirs) for name, theirs in sorted(cells.items())], outside


def middle(values: Sequence[float | None]) -> float | None:
    """The median of the values that are there."""
    known = [value for value in values if value is not None and isfinite(value)]
    return median(known) if known else None


def _stack(name: str, cells: Mapping[tuple[int, str], list[Linear]]) -> Stack:
    return Stack(
        name,
        blocks=tuple(sorted({block for block, _ in cells})),
        places=tuple(sorted({place for _, place in cells}, key=_usual)),
        cells={key: tuple(theirs) for key, theirs in cells.items()},
    )


def _usual(place: str) -> tuple[bool, str, int, str]:
    """Attention first, and the parts of each module in the order in which most families run them."""
    module, _, last = place.rpartition(".")
    return "attn" not in place and "attention" not in place, module, _USUAL.index(last) if last in _USUAL else 99, last


def _linear(module: str, entry: Mapping[str, Any]) -> Linear:
    fallback = entry.get("fallback")
    return Linear(
        module,
        weight_error=_number(entry.get("weight_error")),
        output_error=_number(entry.get("output_error")),
        rtn_output_error=_number(entry.get("rtn_output_error")),
        cut_output_error=_number(entry.get("cut_output_error")),
        sparsity=_number(entry.get("sparsity")),
        rank=_whole(entry.get("rank")),
        damping=_number(entry.get("damping")),
        fallback=None if fallback is None else str(fallback),
        tokens=_whole(entry.get("tokens")),
        bits=_whole(entry.get("bits")),
        group_size=_whole(entry.get("group_size")),
        moved=_number(entry.get("moved")),
        change=_number(entry.get("change")),
        untouched=_number(entry.get("untouched")),
        kept=_number(entry.get("kept")),
        conflict=_number(entry.get("conflict")),
        cosine=_number(entry.get("cosine")),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
