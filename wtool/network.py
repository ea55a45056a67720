"""A checkpoint as a transformers model of which only what runs is in memory.

The model is built without weights, from config.json, by transformers' own class; blocks (the layers of its longest
list of modules) are filled from the checkpoint one at a time and emptied again. Which stored tensor goes to which
parameter is told by transformers' own loading rules, so that experts which it fuses into one parameter are found
again under their names on disk.
"""

from __future__ import annotations

import copy
import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from wtool.checkpoint import Checkpoint
from wtool.dtypes import torch_dtype
from wtool.errors import InputError, MissingInput
from wtool.loading import code_files, explained, model_folder, quiet

Read = Callable[[str], Tensor]  # a tensor of the checkpoint by name


@dataclass(frozen=True)
class Slot:
    """Where a stored matrix lies in the model: a part of a parameter."""

    parameter: str
    expert: int | None = None  # of a parameter that holds a matrix for each expert
    rows: tuple[int, int] | None = None  # first and one past the last; None for all
    transposed: bool = False  # the model keeps it [in, out]

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix [out, in] in what has the parameter's shape."""
        found = parameter if self.expert is None else parameter[self.expert]
        found = found if self.rows is None else found[slice(*self.rows)]
        return found.T if self.transposed else found


@dataclass(frozen=True)
class Linear:
    """A matrix that multiplies activations."""

    name: str  # of its tensor in the checkpoint
    shape: tuple[int, int]  # out, in
    slot: Slot


@dataclass(frozen=True)
class Group:
    """Stored tensors that become one parameter (or, by a converter of transformers, some)."""

    target: str  # the parameter, the first of them
    sources: tuple[str, ...]
    patterns: tuple[str, ...] = ()  # of the converter, one a source
    converter: WeightConverter | None = None


@dataclass
class Block:
    """One layer of the model."""

    index: int
    name: str  # of its module
    module: nn.Module
    groups: list[Group] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)
    fused: bool = False  # holds experts, which see only the tokens that are routed to them


class Network:
    """A model as blocks; parameters are on the meta device but while they are needed.

    dtype: safetensors name of the type to compute in
    raises: InputError where no such model can be built or walked, UsageError where it needs code of its own
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, device: str = "cpu", trust_remote_code: bool = False):
        self.checkpoint = checkpoint
        self.dtype = torch_dtype(dtype)
        self.device = torch.device(device)
        self.model = _skeleton(checkpoint, self.dtype, trust_remote_code).eval()
        self.model.requires_grad_(False)
        for buffers in (module._buffers for module in self.model.modules()):
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffers[name] = buffer.to(self.device)
        self.blocks = [Block(i, name, module) for i, (name, module) in enumerate(_longest_list(self.model))]
        self.rest: list[Group] = []  # of what is outside the blocks
        self.unknown: list[str] = []  # stored tensors that have no place in the model
        self._sort_tensors()
        probes: dict[Any, list[Slot | None]] = {}
        for block in self.blocks:
            block.linears = list(_linears(self, block, probes))
            block.fused = any(linear.slot.expert is not None for linear in block.linears)

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self.checkpoint.read(name)

    @contextmanager
    def filled(self, block: Block, read: Read | None = None) -> Iterator[None]:
        """The block with its weights, for a while.

        read: where its tensors come from, if not from the checkpoint
        raises: MissingInput where the checkpoint lacks one
        """
        try:
            self.fill(block, read or self.read)
            self._refuse_missing(block.name, block.module)
            yield
        finally:
            _empty(block.module)

    def fill(self, block: Block, read: Read) -> None:
        """Put tensors into a block."""
        for group in block.groups:
            self._fill(group, read)

    @contextmanager
    def filled_modules(self, names: Sequence[str]) -> Iterator[list[nn.Module]]:
        """Modules with their own weights, for a while, wherever they are in the model.

        raises: MissingInput where the checkpoint lacks one
        """
        modules = [self.model.get_submodule(name) for name in names]
        try:
            for name, module in zip(names, modules, strict=True):
                for group in self._home(f"{name}."):
                    if group.target.rpartition(".")[0] == name:
                        self._fill(group, self.read)
                self._refuse_missing(name, module)
            yield modules
        finally:
            for module in modules:
                _empty(module)

    @contextmanager
    def filled_on_demand(self, *, head: bool = False) -> Iterator[None]:
        """What is outside the blocks, each module filled when it is called, for a while.

        Of an embedding only the rows that are looked up are read.

        head: have the head filled too where it is the embedding again
        """
        groups: dict[str, list[Group]] = {}
        for group in self.rest:
            groups.setdefault(group.target.rpartition(".")[0], []).append(group)
        hooks, filled = [], self._fill_tied_head(groups) if head else []

        def fill(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                for group in groups[name]:
                    if _is_lookup(module, group, arguments):
                        self._fill_rows(module, group, arguments[0])
                    elif module not in filled:
                        self._fill(group, self.read)
                filled.append(module)

            return hook

        for name in groups:
            hooks.append(self.model.get_submodule(name).register_forward_pre_hook(fill(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in filled:
                _empty(module, recurse=False)

    def _fill_tied_head(self, groups: Mapping[str, Sequence[Group]]) -> list[nn.Module]:
        """Fill the embedding and a head that is tied to it; the modules that were filled."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        names = {module: name for name, module in self.model.named_modules()}
        if head is None or names.get(head) in groups or names.get(embedding) not in groups:
            return []
        for group in groups[names[embedding]]:
            self._fill(group, self.read)
        head._parameters["weight"] = embedding._parameters["weight"]
        return [head, embedding]

    def view(self, linear: Linear) -> Tensor:
        """A filled matrix where the model has it, [out, in]; writing to it changes the model."""
        return linear.slot.of(self.model.get_parameter(linear.slot.parameter).data)

    def _sort_tensors(self) -> None:
        """Find the parameter that each stored tensor goes to, and the block that has it."""
        places = self.model.state_dict(keep_vars=True)
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        found: dict[str, list[tuple[str, str | None]]] = {}
        prefix = self.model.base_model_prefix
        for name in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, places)
            if target not in places and name in places:
                target, pattern = name, None
            if target in places:
                found.setdefault(target, []).append((name, pattern))
            else:
                self.unknown.append(name)
        for target, sources in found.items():
            names = tuple(name for name, _ in sources)
            patterns = tuple(pattern for _, pattern in sources if pattern is not None)
            group = Group(target, names, patterns, by_pattern[patterns[0]] if patterns else None)
            self._home(target).append(group)

    def _home(self, target: str) -> list[Group]:
        for block in self.blocks:
            if target.startswith(f"{block.name}."):
                return block.groups
        return self.rest

    def _fill(self, group: Group, read: Read) -> None:
        for name, tensor in self._converted(group, {source: read(source) for source in group.sources}).items():
            self._set(name, tensor, group.sources[0])
        for source in group.sources:
            self.checkpoint.forget(source)

    def _converted(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return {group.target: tensors[group.sources[0]]}
        converter = copy.deepcopy(group.converter)
        for source, pattern in zip(group.sources, group.patterns, strict=True):
            converter.add_tensor(group.target, source, pattern, tensors[source])  # pyright: ignore[reportArgumentType]
        with quiet():
            made = converter.convert(group.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _set(self, name: str, tensor: Tensor, source: str) -> None:
        module, leaf = self._owner(name)
        place = module._parameters.get(leaf, module._buffers.get(leaf))
        assert place is not None, name
        if place.shape != tensor.shape:
            raise InputError(
                f"{self.checkpoint.label}: tensor '{source}' gives {list(tensor.shape)} for '{name}', "
                f"but config.json asks for {list(place.shape)}"
            )
        value = tensor.to(self.device, place.dtype, copy=True).contiguous()
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _fill_rows(self, module: nn.Module, group: Group, ids: Tensor) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        if weight.is_meta:  # pages that nobody writes to take no memory
            weight = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=self.device), False)
            module._parameters["weight"] = weight
        rows = ids.unique().cpu()
        weight.data[rows.to(self.device)] = self.read(group.sources[0])[rows].to(self.device, weight.dtype)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _refuse_missing(self, path: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise MissingInput(
                    f"{self.checkpoint.label}: lacks the weights of '{path}.{name}', which config.json asks for"
                )


class Regions:
    """Tells which linears of a filled block a piece of memory is."""

    def __init__(self, network: Network, linears: Iterable[Linear]):
        views = sorted(((network.view(linear).data_ptr(), linear) for linear in linears), key=lambda pair: pair[0])
        self._begins = [begin for begin, _ in views]
        self._linears = [linear for _, linear in views]

    def of(self, weight: Tensor) -> tuple[Linear, ...]:
        """The linears that a matrix is, or is made of; none for any other."""
        begin = weight.data_ptr()
        first = bisect_left(self._begins, begin)
        last = bisect_left(self._begins, begin + weight.nbytes, lo=first)
        found = tuple(self._linears[first:last])
        whole = sum(linear.shape[0] * linear.shape[1] for linear in found) == weight.numel()
        return found if whole else ()


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    label = checkpoint.label
    if not checkpoint.config:
        raise MissingInput(f"{label}: no config.json beside the weights, and without it no model can be built")
    code = code_files(checkpoint, trust_remote_code)
    with explained(label, "build the model"), quiet(), model_folder(checkpoint, code) as folder:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if config.is_encoder_decoder:
            raise InputError(f"{label}: {config.model_type} has an encoder and a decoder, which cannot be walked yet")
        config._experts_implementation = "eager"  # one expert after the other, each with the tokens routed to it
        own = getattr(transformers, (config.architectures or [""])[0], None)  # the class it was saved by
        with init_empty_weights(include_buffers=False):
            if own is not None:
                return own._from_config(config, dtype=dtype)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _longest_list(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers: the list of modules with the most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__}: has no list of layers, so it cannot be walked block by block")
    name, layers = max(lists, key=lambda pair: (sum(p.numel() for p in pair[1].parameters()), -len(pair[0])))
    return [(f"{name}.{i}", layer) for i, layer in enumerate(layers)]


def _linears(network: Network, block: Block, probes: dict[Any, list[Slot | None]]) -> Iterator[Linear]:
    """The matrices of a block that activations are multiplied with, under their names on disk."""
    for group in block.groups:
        module, leaf = network._owner(group.target)
        tensors = network.checkpoint.tensors
        slots: Sequence[Slot | None] = [None]
        if group.converter is not None:
            shapes = tuple(tensors[source].shape for source in group.sources)
            key = (group.patterns, shapes)
            if key not in probes:
                probes[key] = _probe(network, group, shapes)
            slots = [slot and replace(slot, parameter=group.target) for slot in probes[key]]
        elif leaf == "weight" and isinstance(module, nn.Linear):
            slots = [Slot(group.target)]
        elif leaf == "weight" and isinstance(module, Conv1D):
            slots = [Slot(group.target, transposed=True)]
        for source, slot in zip(group.sources, slots, strict=True):
            shape = tensors[source].shape
            if slot is not None and len(shape) == 2:
                yield Linear(source, (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1]), slot)


def _probe(network: Network, group: Group, shapes: Sequence[tuple[int, ...]]) -> list[Slot | None]:
    """Find where a converter puts each stored matrix: let it convert matrices of numbers that tell them apart."""
    none: list[Slot | None] = [None] * len(shapes)
    if any(len(shape) != 2 for shape in shapes) or len(shapes) > 30_000:
        return none
    marks = {
        name: torch.full(shape, number, dtype=torch.int16)
        for number, (name, shape) in enumerate(zip(group.sources, shapes, strict=True), 1)
    }
    made = network._converted(group, marks)
    if set(made) != {group.target} or made[group.target].ndim not in (2, 3):
        return none
    fused = made[group.target]
    planes = enumerate(fused) if fused.ndim == 3 else [(None, fused)]
    slots = none
    for expert, plane in planes:
        for number in plane[:, 0].unique().tolist() if plane.shape[1] else []:
            rows = (plane[:, 0] == number).nonzero().flatten()
            begin, end = int(rows[0]), int(rows[-1]) + 1
            fits = (end - begin, plane.shape[1]) == shapes[number - 1]
            if fits and bool((plane[begin:end] == number).all()):
                slots[number - 1] = Slot(group.target, expert, (begin, end))
    return slots if not _turns(network, group, shapes) else none


def _turns(network: Network, group: Group, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a converter does more than lay matrices beside each other: turns them, or orders their rows anew."""
    numbered = {
        name: torch.arange(shape[0], dtype=torch.int32)[:, None].expand(shape)
        for name, shape in zip(group.sources, shapes, strict=True)
    }
    made = network._converted(group, numbered)[group.target]
    column = made.reshape(-1, made.shape[-1])[:, [0, -1]]
    expected = torch.cat([torch.arange(rows) for rows in _row_runs(column[:, 0])])
    return not (torch.equal(column[:, 0], column[:, 1]) and torch.equal(column[:, 0], expected.to(torch.int32)))


def _row_runs(numbers: Tensor) -> list[int]:
    """Lengths of the runs that begin with 0."""
    begins = [*(numbers == 0).nonzero().flatten().tolist(), len(numbers)]
    return [end - begin for begin, end in zip(begins, begins[1:], strict=False)]


def _is_lookup(module: nn.Module, group: Group, arguments: tuple[Any, ...]) -> bool:
    """Whether a module looks up rows of its weight by the numbers it is called with, as they are."""
    if not isinstance(module, nn.Embedding) or group.converter is not None or not arguments:
        return False
    takes = next(iter(inspect.signature(module.forward).parameters), None)
    return takes in ("input", "input_ids") and group.target.endswith(".weight") and isinstance(arguments[0], Tensor)


def _empty(module: nn.Module, recurse: bool = True) -> None:
    """Forget a module's weights."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
