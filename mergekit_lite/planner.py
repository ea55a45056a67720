"""From a recipe to a plan: which tensors go into which, with which numbers; and every problem there is.

This is the only place in the room that knows names. It works from headers, so it takes as long for a model on the
Hub that nobody has downloaded as for one on disk.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wtool.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from wtool.checkpoint.quantized import refuse_quantized
from wtool.checkpoint.tied import embedding_name, head_name, is_tied
from wtool.dtypes import FLOATS, config_name, promote, torch_dtype
from wtool.errors import Mismatch, UsageError, did_you_mean
from wtool.plan import DEFAULT_SHARD_BYTES, Plan, Step, Told
from wtool.shards import json_bytes

from .card import model_card
from .disagreement import figures
from .lineage import common_base
from .methods import Method, Parameter
from .parameters import LAYER, Depths, resolve
from .random_mask import mask_key
from .recipe import MergeRecipe
from .tokenizer import compare

# Buffers that old versions of transformers saved and new ones compute: not weights, and no loss where one is missing.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
MAX_LISTED = 5  # tensors named one by one in a list of problems


def plan_merge(
    recipe: MergeRecipe,
    *,
    headers_only: bool = False,
    low_disk: Path | None = None,
    ignore_tokenizers: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Plan:
    """Make the plan of a merge.

    headers_only: models on the Hub are not downloaded; the plan can be shown and not run
    low_disk: a folder to keep the shards of models on the Hub in while they are read, instead of the cache
    ignore_tokenizers: merge though the same numbers mean other tokens

    raises: UsageError, InputError where there is nothing to plan on; else `Plan.problems` tells
    """
    warnings: list[str] = []
    if recipe.method.has_base and recipe.base_model is None:
        models = [open_checkpoint(entry.model, headers_only=headers_only, low_disk=low_disk) for entry in recipe.models]
        if found := common_base(models):
            recipe = recipe.model_copy(update={"base_model": found})
            warnings.append(f"no base is given; took {found}, which the cards of all models name")
    base, entries = _roles(recipe)
    names = [base, *(name for name, _ in entries)] if base else [name for name, _ in entries]
    unique = list(dict.fromkeys(names))
    opened = {name: open_checkpoint(name, headers_only=headers_only, low_disk=low_disk) for name in unique}
    for checkpoint in opened.values():
        refuse_quantized(checkpoint)
    sources = tuple(opened.values())
    donor = opened[recipe.base_model or names[0]]
    where = {name: number for number, name in enumerate(unique)}
    planner = _Planner(
        recipe=recipe,
        sources=sources,
        donor=donor,
        base=where[base] if base else None,
        models=[where[name] for name, _ in entries],
        settings=[parameters for _, parameters in entries],
    )
    steps = planner.steps()
    problems = [*planner.problems]
    for source in sources:
        problem, warning = compare(donor, source)
        if problem and not ignore_tokenizers:
            problems.append(f"{problem}; --ignore-tokenizers merges anyway")
        warnings += [text for text in (warning, problem if ignore_tokenizers else None) if text]
    outputs = {name: info for step in steps for name, info in step.outputs.items()}
    config = _config(donor, outputs)
    problems += _config_problems(config, outputs, sources)
    recipe_record = recipe.model_dump(mode="json", exclude_none=True)
    files: dict[str, Any] = {name: path for name, path in donor.files.items() if name != "README.md"}
    files["README.md"] = model_card(recipe_record, sources).encode()
    if config:
        files["config.json"] = json_bytes(config)
    return Plan(
        sources=sources,
        steps=tuple(steps),
        files=files,
        recipe={"merge": recipe_record},
        problems=problems,
        warnings=warnings,
        max_shard_bytes=max_shard_bytes,
    )


def _roles(recipe: MergeRecipe) -> tuple[str | None, list[tuple[str, Mapping[str, Any]]]]:
    """Tell the base from the models.

    A method with a base takes it aside, also where it is among the models. Slerp starts from the base, if one is
    named. For the other methods a base is a model like any other if it has a weight, and else gives only
    configuration and tokenizer.
    """
    method, base = recipe.method, recipe.base_model
    takes_base = method.has_base or (method.may_have_base and base is not None)
    entries: list[tuple[str, Mapping[str, Any]]] = [(entry.model, entry.parameters) for entry in recipe.models]
    if takes_base:
        if base is None:
            raise UsageError(
                f"{recipe.merge_method} needs a base: the checkpoint that the models were fine-tuned from "
                "(--base, or base_model in a recipe)"
            )
        entries = [entry for entry in entries if entry[0] != base]
    elif recipe.merge_method == "slerp" and base is not None:
        entries = [(base, {}), *(entry for entry in entries if entry[0] != base)]
    elif base is not None and "weight" in recipe.parameters and base not in (name for name, _ in entries):
        entries = [(base, {}), *entries]
    if len(entries) < method.least or (method.most is not None and len(entries) > method.most):
        count = f"{method.least}" if method.most == method.least else f"{method.least} or more"
        count = "1" if method.most == 1 else count
        beside = " beside the base" if takes_base else ""
        raise UsageError(f"{recipe.merge_method} takes {count} model(s){beside}; {len(entries)} are given")
    return (base if takes_base else None), entries


class _Planner:
    """Makes the steps, and collects what stands against them."""

    def __init__(
        self,
        recipe: MergeRecipe,
        sources: Sequence[Checkpoint],
        donor: Checkpoint,
        base: int | None,
        models: Sequence[int],
        settings: Sequence[Mapping[str, Any]],
    ):
        self.recipe, self.method = recipe, recipe.method
        self.sources, self.donor = sources, donor
        self.base, self.models, self.settings = base, models, settings
        self.inputs = models if base is None else [base, *models]
        self.problems: list[str] = []
        self._check_required()
        names = list(dict.fromkeys(name for source in (donor, *sources) for name in source.tensors))
        self.head = head_name(names)
        self.embedding = embedding_name(names)
        self.tied = [self._is_tied(source) for source in sources]
        if all(self.tied) and self.head:
            names.remove(self.head)
        self.names = names
        self.depths = Depths(names)

    def _is_tied(self, source: Checkpoint) -> bool:
        return self.embedding is not None and is_tied(source.config)

    def _check_required(self) -> None:
        for name, parameter in self.method.shared.items():
            if parameter.is_required and name not in self.recipe.parameters:
                flag = f"-{name}" if len(name) == 1 else f"--{name}"
                raise UsageError(f"{self.recipe.merge_method} needs '{name}': {flag}, or parameters in a recipe")

    def steps(self) -> list[Step]:
        steps: list[Step] = []
        absent: list[str] = []
        for name in self.names:
            reads = [(source, self._name_in(source, name)) for source in self.inputs]
            missing = [source for source, read in reads if read not in self.sources[source].tensors]
            if missing:
                if not name.endswith(COMPUTED):
                    absent.append(self._absent(name, missing))
                continue
            infos = [self.sources[source].tensors[read] for source, read in reads]
            if step := self._step(name, reads, infos):
                steps.append(step)
        self.problems += absent[:MAX_LISTED]
        if len(absent) > MAX_LISTED:
            self.problems.append(f"{len(absent) - MAX_LISTED} more tensors are missing in some of the models")
        return steps

    def _name_in(self, source: int, name: str) -> str:
        """The tensor that plays a name's part: for a head tied to the embedding, the embedding."""
        return self.embedding if name == self.head and self.tied[source] and self.embedding else name

    def _absent(self, name: str, missing: Sequence[int]) -> str:
        lacking = self.sources[missing[0]]
        having = next(source for source in self.sources if name in source.tensors)
        return f"tensor '{name}' is in {having.label} and not in {lacking.label}{did_you_mean(name, lacking.tensors)}"

    def _step(self, name: str, reads: list[tuple[int, str]], infos: Sequence[TensorInfo]) -> Step | None:
        first = infos[0]
        for (source, _), info in zip(reads, infos, strict=True):
            if info.shape != first.shape:
                self.problems.append(
                    f"tensor '{name}' is {list(first.shape)} in {self.sources[reads[0][0]].label} "
                    f"and {list(info.shape)} in {self.sources[source].label}"
                )
                return None
        if any(info.dtype not in FLOATS for info in infos):
            return Step(tuple(reads), {name: first}, partial(_equal, name))
        dtype = self.recipe.output_dtype or promote([info.dtype for info in infos])
        function = partial(_call, self.method, self.base is not None, self._numbers(name, torch_dtype(dtype)))
        if self.base is not None:
            function = partial(_call_and_tell, function, name)
        return Step(tuple(reads), {name: TensorInfo(dtype, first.shape)}, function)

    def _numbers(self, name: str, dtype: torch.dtype) -> dict[str, Any]:
        """The method's keyword arguments for one tensor."""
        depth = self.depths.of(name)
        shared = self.recipe.parameters
        numbers: dict[str, Any] = {"dtype": dtype}

        def number(key: str, parameter: Parameter, own: Mapping[str, Any], whose: str) -> Any:
            return resolve(key, parameter, [own, shared], name, depth, whose)

        for key, parameter in self.method.shared.items():
            if parameter.argument != "":
                numbers[parameter.argument or key] = number(key, parameter, {}, "parameters")
        for key, parameter in self.method.per_model.items():
            numbers[key] = [
                number(key, parameter, own, self.sources[source].label)
                for own, source in zip(self.settings, self.models, strict=True)
            ]
        if self.method.is_random:
            numbers["key"] = [mask_key(self.recipe.seed, i, name) for i in range(len(self.models))]
        total = sum(numbers.get("weight", [1.0]))
        if numbers.get("normalize") and self.base is None and total == 0:
            raise UsageError(
                f"the weights of tensor '{name}' sum to 0, and a mean divides by it; normalize: false adds up"
            )
        return numbers


def _call(method: Method, based: bool, numbers: Mapping[str, Any], *tensors: Tensor) -> Tensor:
    if method.may_have_base:
        return method.function(tensors[0] if based else None, tensors[1:] if based else tensors, **numbers)
    if method.has_base:
        return method.function(tensors[0], tensors[1:], **numbers)
    return method.function(tensors, **numbers)


def _call_and_tell(call: Callable[..., Tensor], name: str, *tensors: Tensor) -> Told:
    """With figures for the report, of a method that has a base."""
    merged = call(*tensors)
    told = figures(tensors[0], tensors[1:], merged)
    return Told((merged,), {name.removesuffix(".weight"): told} if told else {})


def _equal(name: str, *tensors: Tensor) -> Tensor:
    """What is not a float (a mask, a counter) is not merged: it must be the same everywhere."""
    if any(not torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        raise Mismatch(f"tensor '{name}' is {tensors[0].dtype}, which is not merged, and differs between the models")
    return tensors[0].contiguous()


def _config(donor: Checkpoint, outputs: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The donor's config.json, agreeing with the weights that are written."""
    if not donor.config:
        return {}
    config = {key: value for key, value in donor.config.items() if key != "_name_or_path"}
    floats = [info for info in outputs.values() if info.dtype in FLOATS]
    if floats:
        kinds = {info.dtype: sum(i.nbytes for i in floats if i.dtype == info.dtype) for info in floats}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = config_name(max(kinds, key=lambda k: kinds[k]))
    if head_name(outputs) and is_tied(config):
        config["tie_word_embeddings"] = False  # an input has a head of its own, so the output does
    return config


def _config_problems(
    config: Mapping[str, Any], outputs: Mapping[str, TensorInfo], sources: Sequence[Checkpoint]
) -> list[str]:
    problems: list[str] = []
    kinds = {source.label: source.config.get("model_type") for source in sources if source.config}
    if len(set(kinds.values())) > 1:
        problems.append("models of several kinds: " + ", ".join(f"{label} is {kind}" for label, kind in kinds.items()))
    embedding = embedding_name(outputs)
    size = config.get("vocab_size")
    if embedding and isinstance(size, int) and outputs[embedding].shape[0] != size:
        rows = outputs[embedding].shape[0]
        problems.append(f"config.json has vocab_size {size}, but '{embedding}' has {rows} rows")
    layers = config.get("num_hidden_layers")
    counted = _layers(outputs)
    if isinstance(layers, int) and counted and counted < layers:
        problems.append(f"config.json has num_hidden_layers {layers}, but the weights have {counted} layers")
    return problems


def _layers(names: Mapping[str, Any]) -> int:
    return max((int(match[2]) + 1 for name in names if (match := LAYER.match(name))), default=0)
