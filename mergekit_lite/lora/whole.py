"""Tensors that adapters hold whole, beside their factors.

Modules to save become their weighted mean. What PEFT saves of the base beside an embedding's factors is copied, where
all adapters have it and it is the same.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from wtool.checkpoint.base import TensorInfo
from wtool.dtypes import torch_dtype
from wtool.errors import Mismatch, UsageError
from wtool.plan import Step

from ..methods.linear import linear
from .files import PREFIX, Adapter

MERGE_MODELS = "merge the models instead (wtool merge BASE+A BASE+B)"


def whole_steps(
    adapters: Sequence[Adapter], weight: Sequence[float], dtype: str
) -> tuple[list[Step], list[str], list[str]]:
    """Steps for whole tensors, which every adapter must have; problems; and what the user should know.

    weight: one an adapter
    dtype: of a mean
    raises: UsageError where weights sum to 0
    """
    steps, problems, left = [], [], []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.saved):
        of_base = name.rpartition(".")[0] in {module for adapter in adapters for module in adapter.updates}
        lacking = next((adapter for adapter in adapters if name not in adapter.saved), None)
        holder = next(adapter for adapter in adapters if name in adapter.saved)
        if lacking and of_base:
            left.append(f"{holder.label} brings its base's '{name}' and {lacking.label} does not: it is left out")
        if lacking and not of_base:
            problems.append(
                f"{holder.label} holds '{name}' whole and {lacking.label} does not: their mean needs the base; "
                f"{MERGE_MODELS}"
            )
        if lacking:
            continue
        infos = [adapter.tensors[adapter.saved[name]] for adapter in adapters]
        if len({info.shape for info in infos}) > 1:
            problems.append(f"'{name}' is {' and '.join(str(list(info.shape)) for info in infos)} in the adapters")
            continue
        if sum(weight) == 0 and not of_base:
            raise UsageError(f"the weights sum to 0, and '{name}', which the adapters hold whole, is their mean")
        reads = tuple((i, adapter.saved[name]) for i, adapter in enumerate(adapters))
        if of_base:
            steps.append(Step(reads, {adapters[0].saved[name]: infos[0]}, partial(_same, name)))
        else:
            function = partial(_mean, weight, torch_dtype(dtype))
            steps.append(Step(reads, {PREFIX + name: TensorInfo(dtype, infos[0].shape)}, function))
    return steps, problems, left


def _mean(weight: Sequence[float], dtype: torch.dtype, *tensors: Tensor) -> Tensor:
    return linear(tensors, weight=weight, dtype=dtype)


def _same(name: str, *tensors: Tensor) -> Tensor:
    if any(not torch.equal(tensors[0], tensor.to(tensors[0].dtype)) for tensor in tensors[1:]):
        raise Mismatch(f"the adapters' bases have unlike '{name}': one of them has another vocabulary, or was trained")
    return tensors[0].contiguous()
