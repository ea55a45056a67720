"""From a recipe to the plan of a GGUF file: every tensor's name and type there, the metadata, the file's header."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from wtool import __version__
from wtool.checkpoint import Checkpoint, TensorInfo
from wtool.checkpoint.gguf_export import (
    LEFT_OUT,
    as_stored,
    family_for,
    gguf_name,
    hyperparameters,
    notes,
    rope_divisors,
)
from wtool.checkpoint.gguf_families import ROPE_FREQS, Family
from wtool.checkpoint.tied import head_name, is_tied
from wtool.dtypes import torch_dtype
from wtool.errors import RuntimeProblem
from wtool.finite import refuse_nonfinite
from wtool.formats.gguf import PLAIN, TYPES, encode
from wtool.gguf_config import full_config
from wtool.gguf_shard import GGUFLayout
from wtool.gguf_tokenizer import tokenizer_metadata
from wtool.plan import Plan, Step, Told
from wtool.statistics_folder import Statistics, check_model, open_statistics

from .gguf_types import DEFAULT_TYPE, MIXTURES, Given, type_of
from .recipe import OF_GGUF, QuantRecipe
from .rotating import as_it_lies, open_source, rotation_noted, rotation_told, rotation_warnings

QUANTIZATION_VERSION = 2  # llama.cpp's, of the blocks' layouts


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    source: str  # its name in the checkpoint
    name: str  # in the file
    shape: tuple[int, ...]
    given: Given

    @property
    def number(self) -> int:
        """ggml's, of its type."""
        return PLAIN[self.given.type] if self.given.type in PLAIN else TYPES[self.given.type].number

    @property
    def info(self) -> TensorInfo:
        """What is written."""
        if self.given.type in PLAIN:
            return TensorInfo(self.given.type, self.shape)
        return TensorInfo("U8", (*self.shape[:-1], TYPES[self.given.type].row_bytes(self.shape[-1])))


def plan_gguf(recipe: QuantRecipe, *, headers_only: bool = False) -> Plan:
    """Make the plan of a GGUF file.

    headers_only: a model on the Hub is not downloaded; the plan can be shown and not run

    raises: UsageError, InputError, RuntimeProblem where the gguf package is missing
    """
    if find_spec("gguf") is None:
        raise RuntimeProblem("writing GGUF needs the gguf package: pip install 'wtool[gguf]'")
    source = open_source(recipe, headers_only=headers_only)
    architecture, family = family_for(source.config, source.label)
    config = full_config(source)
    mixture = recipe.type or DEFAULT_TYPE
    entries = _entries(source, family, config, mixture)
    rows = next(entry.shape[0] for entry in entries if entry.name == "token_embd.weight")
    statistics = None if recipe.statistics is None else open_statistics(Path(recipe.statistics))
    if statistics is not None:
        check_model(statistics, source)
    steps = [_step(entry, family, config, statistics) for entry in entries]
    types = {entry.name: (entry.number, entry.shape) for entry in entries}
    if divisors := rope_divisors(config, source.label):
        steps.insert(0, Step((), {ROPE_FREQS: TensorInfo("F32", (len(divisors),))}, partial(torch.tensor, divisors)))
        types[ROPE_FREQS] = (PLAIN["F32"], (len(divisors),))
    name = _name(source)
    metadata = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": MIXTURES[mixture][1],
        "general.quantization_version": QUANTIZATION_VERSION,
        **hyperparameters(architecture, family, config, source.label),
        **tokenizer_metadata(source, rows),
    }
    record = {**recipe.model_dump(mode="json", exclude_none=True, include=OF_GGUF), "type": mixture}
    filename = f"{name}-{mixture}.gguf"
    summary = _summary(source, entries)
    return Plan(
        sources=(source,) if statistics is None else (source, statistics.matrices),
        steps=tuple(steps),
        files={"README.md": _card(record, source, filename, summary).encode()},
        recipe={"quantize": record, **rotation_noted(source)},
        warnings=notes(architecture, config) + _warnings(source, entries) + rotation_warnings(source, steps),
        about={"summary": summary, **rotation_told(recipe, source)},
        layout=GGUFLayout(filename, metadata, types),
    )


def _entries(source: Checkpoint, family: Family, config: Mapping[str, Any], mixture: str) -> list[Entry]:
    head = head_name(source.tensors)
    tied = is_tied(dict(config)) or head is None
    entries: list[Entry] = []
    for name, info in source.tensors.items():
        if name.endswith(LEFT_OUT) or (tied and name == head):
            continue
        new_name = gguf_name(family, name, source.label)
        given = type_of(new_name, info.shape, mixture, config, tied=tied)
        entries.append(Entry(name, new_name, info.shape, given))
    return entries


def _step(entry: Entry, family: Family, config: Mapping[str, Any], statistics: Statistics | None) -> Step:
    function = partial(_encoded, entry=entry, family=family, config=config)
    met = None if statistics is None else statistics.inputs.get(entry.source)
    reads = (
        ((0, entry.source),) if met is None or entry.given.type in PLAIN else ((0, entry.source), (1, met.linears[0]))
    )
    return Step(reads, {entry.name: entry.info}, function)


def _encoded(
    stored: Tensor, gram: Tensor | None = None, *, entry: Entry, family: Family, config: Mapping[str, Any]
) -> Told | Tensor:
    refuse_nonfinite(stored, f"tensor '{entry.source}'")
    values = as_stored(stored, entry.source, family, config)
    if entry.given.type in PLAIN:
        return values.to(torch_dtype(entry.given.type)).contiguous()
    made = encode(values, entry.given.type, None if gram is None else gram.diagonal())
    report = {"type": entry.given.type, "weight_error": _error(values, made, entry)}
    if entry.given.type != entry.given.wanted:
        report["fallback"] = _why(entry)
    return Told((made,), {entry.source.removesuffix(".weight"): report})


def _error(values: Tensor, made: Tensor, entry: Entry) -> float:
    """|w - decoded| / |w|, as the gguf package decodes, some rows at a time."""
    from gguf import GGMLQuantizationType, quants

    missed = whole = 0.0
    for part, packed in zip(values.split(4096), made.split(4096), strict=True):
        decoded = torch.from_numpy(quants.dequantize(packed.numpy(), GGMLQuantizationType(entry.number)))
        missed += float((part.float() - decoded).double().square().sum())
        whole += float(part.double().square().sum())
    return round((missed / max(whole, 1e-30)) ** 0.5, 6)


def _why(entry: Entry) -> str:
    values = TYPES[entry.given.wanted].values
    return f"rows of {entry.shape[-1]} are no multiple of {values}, which {entry.given.wanted} needs"


def _warnings(source: Checkpoint, entries: Sequence[Entry]) -> list[str]:
    warnings: list[str] = []
    if source.quantization:
        warnings.append(f"{source.label} is quantized already ({source.quantization}); what it lost stays lost")
    other = Counter((each.given.wanted, each.given.type) for each in entries if each.given.wanted != each.given.type)
    first = {(each.given.wanted, each.given.type): each for each in reversed(entries)}
    for (wanted, given), count in other.items():
        example = first[wanted, given]
        warnings.append(
            f"{count} matrices are {given}, not {wanted}: {_why(example)} (the first is '{example.source}')"
        )
    return warnings


def _summary(source: Checkpoint, entries: Sequence[Entry]) -> dict[str, Any]:
    weights = sum(source.tensors[entry.source].elements for entry in entries)
    packed = sum(entry.info.nbytes for entry in entries)
    return {
        "bytes_before": as_it_lies(source).nbytes,
        "bytes_after": packed,
        "weights": weights,
        "bits_per_weight": round(packed * 8 / weights, 4),
        "types": dict(Counter(entry.given.type for entry in entries).most_common()),
    }


def _name(source: Checkpoint) -> str:
    """The model's name, as far as a file name can have it."""
    last = source.label.split("@")[0].split("+")[0].rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def _card(record: Mapping[str, Any], source: Checkpoint, filename: str, summary: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {"tags": ["gguf", "quantized", "wtool"]}
    if source.revision:
        head |= {"base_model": [source.label.split("@")[0]], "base_model_relation": "quantized"}
    types = ", ".join(f"{count} x {kind}" for kind, count in summary["types"].items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {source.label} as GGUF\n\n"
        f"Made with wtool {__version__}: `{filename}`, {summary['bits_per_weight']:.2f} bits per weight ({types}).\n\n"
        f"`llama-cli -m {filename}` runs it.\n\n## Recipe\n\nSave it as `recipe.yml` and run "
        f"`wtool quantize recipe.yml -o OUT`.\n\n```yaml\n{yaml.safe_dump(dict(record), sort_keys=False)}```\n"
    )
