"""The difference of two checkpoints as a LoRA adapter: what was asked, and the plan of it, a step a matrix.

With D = W_tuned - W_base, an adapter holds the product B A nearest to D of its rank (`svd`). Linear layers, an
output head of its own and, if asked for, the embedding are put so; what else changed is told, and kept whole if asked
for. A tied head is changed with its embedding: then both get the same factors, as PEFT keeps them apart.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.checkpoint.adapter import SETTINGS
from wtool.checkpoint.quantized import refuse_quantized
from wtool.checkpoint.tied import embedding_name, head_name, is_tied
from wtool.dtypes import parse_float_dtype, torch_dtype
from wtool.errors import Mismatch, UsageError
from wtool.executors.local import check_place
from wtool.linear_names import TRANSPOSED
from wtool.plan import Plan, Step, Told
from wtool.shards import json_bytes

from ..arithmetic.random_mask import mask_key
from . import svd
from .card import card
from .files import PREFIX, factor_infos, one_file, settings_of
from .survey import ByEnergy, Change, record, survey
from .targets import Target, find_targets, listed, short_targets, task_type


@dataclass(frozen=True)
class LoraExtract:
    """What was asked."""

    tuned: str
    base: str
    rank: int | None = None  # of every module; or
    energy: float | None = None  # the share of |D|² that each module's rank keeps, in (0, 1]
    max_rank: int | None = None
    include: str | None = None  # regular expressions, searched in modules' names
    exclude: str | None = None
    randomized: bool = False
    embed: bool = False
    save_modules: bool = False
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("give either --rank (of every module) or --energy (the share of its change to keep)")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy {self.energy:g}: give a share above 0 and at most 1, such as 0.95")
        if self.max_rank is not None and self.energy is None:
            raise UsageError("--max-rank goes with --energy; --rank alone is the rank of every module")
        if self.randomized and self.energy is not None and self.max_rank is None:
            raise UsageError("--randomized with --energy needs --max-rank: how many directions to look for")
        for option, pattern in (("--include", self.include), ("--exclude", self.exclude)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise UsageError(f"{option} '{pattern}': not a regular expression: {error}") from None


def plan_lora_extract(
    asked: LoraExtract,
    out: Path,
    *,
    force: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Plan:
    """Look at what changed (`survey`), and make the plan.

    out: where the adapter is to be
    raises: UsageError, InputError, OutputError, RuntimeProblem
    """
    base, tuned = open_checkpoint(asked.base), open_checkpoint(asked.tuned)
    for checkpoint in (base, tuned):
        refuse_quantized(checkpoint)
    check_place(Plan((base, tuned), (), {}, {}), out)
    targets, warnings = find_targets(base, tuned, include=asked.include, exclude=asked.exclude, embed=asked.embed)
    by_energy = ByEnergy(asked.energy, asked.max_rank, asked.randomized, asked.seed) if asked.energy else None
    wanted = {name: target.wanted for name, target in targets.items()}
    fingerprint, changes = survey(base, tuned, wanted, by_energy, out, force=force, workers=workers, progress=progress)
    changed = [target for name, target in targets.items() if changes[name].size]
    by_name = {target.name: changes[name] for name, target in targets.items()}
    steps, ranks = _factor_steps(asked, base, tuned, changed, by_name)
    saved = _whole(targets.values(), changed, ranks) if asked.save_modules else {}
    saved |= _tied_head(saved, base, tuned)
    left = [target for target in changed if not target.shape and target.name not in saved]
    if not steps:
        raise Mismatch(
            f"{tuned.label}: nothing that an adapter could hold differs from {base.label}"
            + (
                f"; what differs: {listed(target.name for target in changed if not target.shape)} "
                if left or saved
                else ""
            )
        )
    told = {target.name: asdict(by_name[target.name]) for target in left}
    return Plan(
        sources=(base, tuned),
        steps=(*steps, *(_copy(tuned, target, name) for name, target in saved.items())),
        files=_files(asked, base, tuned, ranks, saved),
        recipe={"extract-lora": asdict(asked)},
        warnings=[*warnings, *_warnings(left, by_name, ranks, embedding_name(base.tensors))],
        about={"survey": record(fingerprint, changes), "left_out": told},
        layout=one_file,
    )


def _factor_steps(
    asked: LoraExtract,
    base: Checkpoint,
    tuned: Checkpoint,
    changed: list[Target],
    changes: Mapping[str, Change],
) -> tuple[list[Step], dict[str, int]]:
    """A step for each matrix that changed, and the modules' ranks."""
    steps: list[Step] = []
    ranks: dict[str, int] = {}
    both_tied = is_tied(base.config) and is_tied(tuned.config)
    for target in changed:
        if target.shape is None:
            continue
        rank = min(changes[target.name].rank or asked.rank or 1, *target.shape)
        head = (head_name(base.tensors) or "lm_head.weight").removesuffix(".weight")
        tied_head = head if target.is_embedding and both_tied else None
        ranks |= {module: rank for module in (target.module, tied_head) if module}
        steps.append(_step(asked, target, rank, changes[target.name], tied_head))
    return steps, ranks


def _step(asked: LoraExtract, target: Target, rank: int, change: Change, tied_head: str | None) -> Step:
    assert target.shape is not None
    out, columns = target.shape
    dtype = parse_float_dtype(asked.dtype)
    outputs = factor_infos(target.module, (out, columns), rank, dtype, is_embedding=target.is_embedding)
    if tied_head:
        outputs |= factor_infos(tied_head, (columns, out), rank, dtype)
    function = partial(
        extract,
        target.module,
        rank,
        transposed=target.wanted.transposed,
        key=mask_key(asked.seed, 0, target.name) if asked.randomized else None,
        with_head=tied_head is not None,
        change=change,
        dtype=torch_dtype(dtype),
    )
    scratch = 8 * (2 * out * columns + (0 if asked.randomized else 3 * min(out, columns) ** 2))
    return Step(((0, target.wanted.base), (1, target.wanted.tuned)), outputs, function, scratch=scratch)


def extract(
    module: str,
    rank: int,
    base: Tensor,
    tuned: Tensor,
    *,
    transposed: bool,
    key: int | None,
    with_head: bool,
    change: Change,
    dtype: torch.dtype,
) -> Told:
    """The factors of one matrix's change, and how far they are from it.

    key: of random projections; None computes all directions
    with_head: the same for a head that is the embedding again
    returns: a and b as they are written; the report's error is that of what is written, rounding and all
    """
    matrix = tuned.double().sub_(base)
    matrix = matrix.t() if transposed else matrix
    found = svd.exact(matrix) if key is None else svd.randomized(matrix, rank, key)
    factors = svd.project(matrix, found, rank)
    a, b = factors.a.to(dtype).contiguous(), factors.b.to(dtype).contiguous()
    total = torch.linalg.vector_norm(matrix)
    error = torch.linalg.vector_norm(matrix.sub_(b.double() @ a.double())) / total
    report = {"rank": rank, "relative_error": float(error), "change": change.relative}
    return Told((a, b, b.t().contiguous(), a.t().contiguous()) if with_head else (a, b), {module: report})


def _whole(targets: Iterable[Target], changed: list[Target], ranks: Mapping[str, int]) -> dict[str, Target]:
    """The tensors to keep whole, by their names: all those of a module of which one changed.

    PEFT saves a module with what is in it, and finds it by the end of its name: modules that cannot be told so from
    others, or that hold others, are left, and so are those that have factors.
    """
    every = {target.module for target in targets}
    wanted = {target.module for target in changed if not target.shape and target.module not in ranks}
    clear = {
        module
        for module in wanted
        if not any(
            other != module and (other.startswith(f"{module}.") or other.endswith(module) and other not in wanted)
            for other in every
        )
    }
    return {target.name: target for target in targets if target.module in clear}


def _tied_head(saved: Mapping[str, Target], base: Checkpoint, tuned: Checkpoint) -> dict[str, Target]:
    """The head that is an embedding kept whole, which PEFT wants by its own name too."""
    stored = embedding_name(base.tensors)
    embedding = next((target for target in saved.values() if target.wanted.base == stored), None)
    return {"lm_head.weight": embedding} if embedding and is_tied(base.config) and is_tied(tuned.config) else {}


def _copy(tuned: Checkpoint, target: Target, name: str) -> Step:
    stored = target.wanted.tuned
    return Step(((1, stored),), {f"{PREFIX}{name}": tuned.tensors[stored]}, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _files(
    asked: LoraExtract,
    base: Checkpoint,
    tuned: Checkpoint,
    ranks: Mapping[str, int],
    saved: Mapping[str, Target],
) -> dict[str, Any]:
    """What stands beside the weights: PEFT's settings, the tuned model's tokenizer, a card."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in saved)
    settings = settings_of(
        ranks,
        base=asked.base,
        targets=short_targets(ranks, base),
        task_type=task_type(base.config),
        fan_in_fan_out=base.config.get("model_type") in TRANSPOSED,
        modules_to_save=modules,
    )
    if _tied_head(saved, base, tuned):
        settings["ensure_weight_tying"] = True
    kept = {name: path for name, path in tuned.files.items() if name not in ("README.md", "generation_config.json")}
    readme = card(asked.base, "A LoRA adapter, extracted", [asked.base, asked.tuned], asdict(asked))
    return {**kept, SETTINGS: json_bytes(settings), "README.md": readme.encode()}


def _warnings(
    left: list[Target], changes: Mapping[str, Change], ranks: Mapping[str, int], embedding: str | None
) -> list[str]:
    found: list[str] = []
    if left:
        far = sorted(left, key=lambda target: -changes[target.name].relative)
        each = listed(f"{target.name} (by {changes[target.name].relative:.3g})" for target in far)
        embed = (
            ", --embed makes factors for the embedding" if embedding in [target.wanted.base for target in left] else ""
        )
        found.append(f"changed, and not in the adapter: {each}; --save-modules keeps them whole{embed}")
    if experts := sum(".experts." in module for module in ranks):
        found.append(
            f"{experts} modules are single experts: wtool adds them; PEFT may not, where transformers fuses experts"
        )
    return found
