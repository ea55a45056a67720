"""Combining LoRA adapters without their base: what was asked, and the plan of it, a step a module.

| method | what it makes of the updates D_i = scale_i B_i A_i            | rank of a module without --rank |
|--------|--------------------------------------------------------------|---------------------------------|
| concat | Σ w_i D_i, exactly: factors side by side                      | Σ r_i                           |
| svd    | the same, cut to the nearest of a lower rank                  | the largest r_i                 |
| knots  | D_i aligned on the side of the outputs, merged there          | Σ r_i: nothing is cut           |
| core   | D_i aligned on both sides, merged there                       | Σ r_i: nothing is cut           |

An adapter that does not train a module has a zero update there. No method ever makes the matrix B A.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint.adapter import SETTINGS, TOKENIZERS
from wtool.dtypes import parse_float_dtype, torch_dtype
from wtool.errors import UsageError, did_you_mean
from wtool.plan import Plan, Step, Told
from wtool.shards import json_bytes

from ..arithmetic.random_mask import mask_key
from ..methods.table import METHODS
from .card import card
from .files import Adapter, Update, factor_infos, one_file, open_adapter, settings_of
from .space import Factors, Merge, add, core_space, cut, filled, knots
from .whole import whole_steps

SPACES = {"knots": knots, "core": core_space}
HOW = ("concat", "svd", *SPACES)
MERGES = ("task_arithmetic", "ties", "dare_linear", "dare_ties")  # of the table of methods, with a base of zeros


@dataclass(frozen=True)
class LoraMerge:
    """What was asked."""

    adapters: tuple[str, ...]
    method: str = "concat"
    weight: tuple[float, ...] = ()  # one an adapter; none is 1 each
    rank: int | None = None
    merge: str = "ties"  # knots and core: how aligned updates become one
    density: tuple[float, ...] = ()  # one an adapter; none is 1 each
    normalize: bool | None = None  # None is the default of `merge`
    lambda_: float = 1.0
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for what, word, known in (("--method", self.method, HOW), ("--merge", self.merge, MERGES)):
            if word not in known:
                raise UsageError(f"{what} '{word}': take {', '.join(known)}{did_you_mean(word, known)}")
        for what, numbers in (("--weight", self.weight), ("--density", self.density)):
            if len(numbers) not in (0, 1, len(self.adapters)):
                raise UsageError(
                    f"{what} is given {len(numbers)} times for {len(self.adapters)} adapters; give it once, or once "
                    "an adapter"
                )
        if any(not 0 <= share <= 1 for share in self.density):
            raise UsageError(f"--density {max(self.density, key=lambda d: abs(d - 0.5))}: give a share from 0 to 1")
        if self.density and (self.method not in SPACES or self.merge == "task_arithmetic"):
            raise UsageError("--density is for --method knots or core with --merge ties, dare_linear or dare_ties")
        if self.rank is not None and (self.rank < 1 or self.method == "concat"):
            cure = "concat cuts nothing (--method svd does)" if self.method == "concat" else "give 1 or more"
            raise UsageError(f"--rank {self.rank}: {cure}")

    def each(self, numbers: Sequence[float]) -> list[float]:
        """One an adapter."""
        return list(numbers if len(numbers) == len(self.adapters) else [*numbers, 1.0][:1] * len(self.adapters))


def plan_lora_merge(asked: LoraMerge, *, ignore_bases: bool = False) -> Plan:
    """Make the plan.

    ignore_bases: combine adapters that name other bases
    raises: UsageError, InputError
    """
    adapters = [open_adapter(reference) for reference in asked.adapters]
    problems, warnings = _bases(adapters, ignore_bases)
    flags = {bool(adapter.settings.get(key)) for adapter in adapters for key in ("fan_in_fan_out",)}
    if len(flags) > 1 or len({bool(adapter.settings.get("ensure_weight_tying")) for adapter in adapters}) > 1:
        problems.append("the adapters disagree on fan_in_fan_out or ensure_weight_tying: they are of unlike bases")
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.updates)
    dtype = parse_float_dtype(asked.dtype)
    steps, ranks = [], {}
    for module in modules:
        updates = [adapter.updates.get(module) for adapter in adapters]
        present = [update for update in updates if update]
        if len({(update.shape, update.is_embedding) for update in present}) > 1:
            shapes = " and ".join(f"{list(update.shape)}" for update in present)
            problems.append(f"module '{module}' is {shapes}: the adapters are of unlike bases")
            continue
        ranks[module] = _rank(asked, present)
        steps.append(_step(asked, module, updates, ranks[module], dtype))
    saved, missing, left = whole_steps(adapters, asked.each(asked.weight), dtype)
    first = adapters[0]
    record = {key.rstrip("_"): value for key, value in asdict(asked).items()}
    return Plan(
        sources=tuple(adapters),
        steps=(*steps, *saved),
        files=_files(
            adapters,
            {
                **settings_of(
                    ranks,
                    base=first.settings.get("base_model_name_or_path"),
                    targets=_targets(adapters, list(modules)),
                    task_type=first.settings.get("task_type"),
                    fan_in_fan_out=bool(first.settings.get("fan_in_fan_out")),
                    modules_to_save=dict.fromkeys(
                        name for adapter in adapters for name in adapter.settings.get("modules_to_save") or ()
                    ),
                ),
                **{key: first.settings[key] for key in ("revision", "ensure_weight_tying") if first.settings.get(key)},
            },
            card(first.base, "A merge of LoRA adapters", asked.adapters, record),
        ),
        recipe={"merge-lora": record},
        problems=[*problems, *missing],
        warnings=[*warnings, *left],
        layout=one_file,
    )


def _files(adapters: Sequence[Adapter], settings: Mapping[str, Any], readme: str) -> dict[str, Any]:
    """What stands beside the weights; the tokenizer of the first adapter that brings one."""
    donor = next((adapter for adapter in adapters if TOKENIZERS & set(adapter.files)), adapters[0])
    files: dict[str, Any] = {name: path for name, path in donor.files.items() if name != "README.md"}
    return {**files, SETTINGS: json_bytes(settings), "README.md": readme.encode()}


def _bases(adapters: Sequence[Adapter], ignore: bool) -> tuple[list[str], list[str]]:
    """Problems and warnings where adapters are not of one base."""
    first = adapters[0]
    found = [
        f"{other.label} is of the base {other.base}, {first.label} of {first.base}"
        for other in adapters[1:]
        if (other.base or "").rstrip("/") != (first.base or "").rstrip("/")
    ]
    return ([], found) if ignore else ([f"{line}; --ignore-bases combines them anyway" for line in found], [])


def _targets(adapters: Sequence[Adapter], modules: list[str]) -> Any:
    """The adapters' own target_modules where they agree and train the same modules; else each module by its name."""
    scope = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    told = [[_unordered(adapter.settings.get(key)) for key in scope] for adapter in adapters]
    narrow = any(adapters[0].settings.get(key) for key in scope[1:])
    if narrow or any(set(adapter.updates) != set(modules) for adapter in adapters) or any(t != told[0] for t in told):
        return sorted(modules)
    return adapters[0].settings.get("target_modules") or sorted(modules)


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _rank(asked: LoraMerge, present: Sequence[Update]) -> int:
    total = sum(update.rank for update in present)
    whole = total if asked.method == "concat" else min(total, *present[0].shape)
    if asked.method == "svd" and asked.rank is None:
        return min(whole, max(update.rank for update in present))
    return min(whole, asked.rank or whole)


def _step(asked: LoraMerge, module: str, updates: Sequence[Update | None], rank: int, dtype: str) -> Step:
    present = [update for update in updates if update]
    out, columns = present[0].shape
    reads = tuple((i, name) for i, update in enumerate(updates) if update for name in (update.a, update.b))
    function = partial(
        combine, asked, module, [update.scale if update else None for update in updates], (out, columns), rank, dtype
    )
    outputs = factor_infos(module, (out, columns), rank, dtype, is_embedding=present[0].is_embedding)
    total = sum(update.rank for update in present)
    aligned = len(updates) * columns * (2 if asked.method == "knots" else 0)
    return Step(reads, outputs, function, scratch=8 * total * (3 * (out + columns) + aligned))


def combine(
    asked: LoraMerge,
    module: str,
    scales: Sequence[float | None],
    shape: tuple[int, int],
    rank: int,
    dtype: str,
    *tensors: Tensor,
) -> Told:
    """Combine the updates of one module.

    scales: one an adapter; None where it does not train the module
    shape: (out, in)
    tensors: a and b of each adapter that trains it
    """
    found = iter(tensors)
    nothing = Factors(torch.zeros(shape[0], 0, dtype=torch.float64), torch.zeros(0, shape[1], dtype=torch.float64))
    updates = []
    for scale in scales:
        if scale is None:
            updates.append(nothing)
            continue
        a, b = next(found).double(), next(found).double()
        updates.append(Factors(b * scale, a))
    weight = asked.each(asked.weight)
    told: dict[str, Any] = {"rank": rank}
    if asked.method in SPACES:
        result = SPACES[asked.method](updates, _merge(asked, module, weight))
    else:
        result = add(updates, [asked.lambda_ * w for w in weight])
    if result.b.shape[1] > rank or asked.method == "svd":
        result, told["relative_error"] = cut(result, rank)
    result = filled(result, rank)
    kind = torch_dtype(dtype)
    return Told((result.a.to(kind).contiguous(), result.b.to(kind).contiguous()), {module: told})


def _merge(asked: LoraMerge, module: str, weight: list[float]) -> Merge:
    """The merge of aligned updates: a method of the table, on a base of zeros."""
    method = METHODS[asked.merge]
    numbers: dict[str, Any] = {"weight": weight, "lambda_": asked.lambda_}
    if asked.normalize is not None:
        numbers["normalize"] = asked.normalize
    if "density" in method.per_model:
        numbers["density"] = asked.each(asked.density)
    if method.is_random:
        numbers["key"] = [mask_key(asked.seed, i, module) for i in range(len(weight))]
    return lambda aligned: method.function(
        torch.zeros_like(aligned[0]), [part.contiguous() for part in aligned], **numbers
    )
