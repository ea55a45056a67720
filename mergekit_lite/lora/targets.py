"""Which tensors of two checkpoints an adapter can hold, and under which names PEFT looks for them."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wtool.checkpoint import Checkpoint
from wtool.checkpoint.tied import HEADS, embedding_name
from wtool.compare import Pairing, pair
from wtool.dtypes import FLOATS
from wtool.errors import Mismatch
from wtool.linear_names import LinearLayer, linear_layers

from .survey import Wanted

# The module that holds a base model inside its language model, where old checkpoints' names leave it out.
TRUNKS = {"gpt2": "transformer"}
LISTED = 5  # names told one by one


@dataclass(frozen=True)
class Target:
    """A tensor of both checkpoints, and what may become of it."""

    wanted: Wanted
    name: str  # the tensor's, as the base's model has it
    shape: tuple[int, int] | None  # (out, in) of its update; None where LoRA cannot hold it
    is_embedding: bool = False

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def find_targets(
    base: Checkpoint, tuned: Checkpoint, *, include: str | None, exclude: str | None, embed: bool
) -> tuple[dict[str, Target], list[str]]:
    """Pair the tensors of two checkpoints, those of modules that are excluded left out.

    include, exclude: regular expressions, searched in modules' names
    embed: LoRA of the embedding too
    returns: targets by name, in the order of the base; and what the user should know
    raises: Mismatch where shapes differ, or nothing is in both
    """
    pairing = pair(base, tuned)
    layers, _ = linear_layers(base)
    embedding = embedding_name(base.tensors)
    found: dict[str, Target] = {}
    for ours, theirs in pairing.pairs:
        info, other = base.tensors[ours], tuned.tensors[theirs]
        name = theirs if ours != theirs and theirs in HEADS else ours
        whole = _in_model(name, base)
        module = whole.rpartition(".")[0]
        chosen = (not include or re.search(include, module)) and not (exclude and re.search(exclude, module))
        if not chosen or info.dtype not in FLOATS:
            continue
        if info.shape != other.shape:
            raise Mismatch(
                f"tensor '{name}' is {list(info.shape)} in {base.label} and {list(other.shape)} in {tuned.label}; "
                "--exclude REGEX leaves a module out"
            )
        is_matrix, transposed, is_embedding = _kind(name, info.shape, layers, embedding if embed else None)
        rows, columns = info.shape if is_matrix else (0, 0)
        shape = (columns, rows) if transposed else (rows, columns)
        wanted = Wanted(ours, theirs, transposed, is_matrix)
        found[name] = Target(wanted, whole, shape if is_matrix else None, is_embedding)
    if not found:
        raise Mismatch(f"{base.label} and {tuned.label} have no tensor in common that is to be looked at")
    return found, _only_in_one(pairing, base, tuned)


def _kind(
    name: str, shape: tuple[int, ...], layers: Mapping[str, LinearLayer], embedding: str | None
) -> tuple[bool, bool, bool]:
    """Whether LoRA can hold a tensor, whether its update lies transposed in it, and whether it is the embedding."""
    if name in layers:
        return True, layers[name].transposed, False
    if name in HEADS and len(shape) == 2:
        return True, False, False
    return name == embedding, name == embedding, name == embedding


def _in_model(name: str, base: Checkpoint) -> str:
    """A tensor's name as the language model has it: with its trunk's."""
    trunk = TRUNKS.get(str(base.config.get("model_type")))
    heads = any(str(each).endswith(("LMHeadModel", "ForCausalLM")) for each in base.config.get("architectures") or ())
    if not trunk or not heads or name in HEADS or any(each.startswith(f"{trunk}.") for each in base.tensors):
        return name
    return f"{trunk}.{name}"


def _only_in_one(pairing: Pairing, base: Checkpoint, tuned: Checkpoint) -> list[str]:
    return [
        f"only in {checkpoint.label}, and left out: {listed(names)}"
        for checkpoint, names in ((base, pairing.only_a), (tuned, pairing.only_b))
        if names
    ]


def listed(names: Iterable[str]) -> str:
    """Some names one by one, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return f"{', '.join(every[:LISTED])}{more}"


def short_targets(modules: Collection[str], base: Checkpoint) -> list[str]:
    """PEFT's target_modules: the last parts of names where all matrices of that name are meant, else whole names."""
    leaves = {module.rpartition(".")[2] for module in modules}
    matrices = {_in_model(name, base).removesuffix(".weight") for name, i in base.tensors.items() if len(i.shape) > 1}
    meant = {module for module in matrices if module.rpartition(".")[2] in leaves}
    return sorted(leaves if meant <= set(modules) else modules)


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's word for what a model is for, where its class tells."""
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    name = next(iter(config.get("architectures") or ()), "")
    return next((kind for ending, kind in kinds.items() if name.endswith(ending)), None)
