"""Optimizers and schedules by name: transformers' own, and what it has no name for.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) is for the matrices of the layers alone; torch
has it, and its learning rate is matched to AdamW's root mean square (Liu et al. 2025, https://arxiv.org/abs/2502.16982)
so that one rate serves both. Embeddings, head, norms and biases go to AdamW.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer, TrainingArguments

from wtool.errors import RuntimeProblem, UsageError

from .recipe import OPTIMIZERS, Training

OF_BITSANDBYTES = ("8bit", "lion", "paged", "bnb")
DEFAULTS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}


class Together(Optimizer):
    """Several optimizers, each with parameters of its own, as one."""

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def class_and_arguments(asked: Training, arguments: TrainingArguments, model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """What the Trainer makes its optimizer with.

    raises: RuntimeProblem where its package is not installed, UsageError for arguments it does not take
    """
    name = OPTIMIZERS.get(asked.optimizer, asked.optimizer)
    if name == "muon":
        return _MuonFactory, {"lr": asked.lr, "weight_decay": asked.weight_decay, **asked.optimizer_arguments}
    if any(word in name for word in OF_BITSANDBYTES) and "torch" not in name and find_spec("bitsandbytes") is None:
        raise RuntimeProblem(
            f"the optimizer {asked.optimizer} needs bitsandbytes, which is not installed (pip install bitsandbytes)"
        )
    try:
        made, known = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # pyright: ignore[reportArgumentType]
    except ImportError as error:
        raise RuntimeProblem(f"the optimizer {asked.optimizer} cannot be used here: {error}") from None
    return made, {**known, **DEFAULTS.get(name, {}), **asked.optimizer_arguments}


class _MuonFactory:
    """In the form in which the Trainer takes an optimizer that wants to see the model."""

    def __call__(self, model: nn.Module, *, lr: float, weight_decay: float, **others: Any) -> Together:
        return muon(model, lr=lr, weight_decay=weight_decay, **others)


def muon(model: nn.Module, *, lr: float, weight_decay: float = 0.0, **others: Any) -> Together:
    """Muon for the matrices of a model's layers, AdamW for all else that is trained.

    others: arguments of torch's Muon

    raises: UsageError where there is no such matrix, or an argument is not Muon's
    """
    looked_up = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    looked_up |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in looked_up]
    rest = [p for p in trained if p.ndim != 2 or id(p) in looked_up]
    if not matrices:
        raise UsageError("muon: no matrix of a layer is trained; take another optimizer")
    settings: dict[str, Any] = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", **others}
    try:
        parts: list[Optimizer] = [Muon(matrices, lr=lr, weight_decay=weight_decay, **settings)]
    except TypeError as error:
        raise UsageError(f"muon: {error}") from None
    return Together([*parts, AdamW(rest, lr=lr, weight_decay=0.0)] if rest else parts)


def one_cycle(optimizer: Optimizer, *, lr: float, steps: int, warmup: float) -> torch.optim.lr_scheduler.LRScheduler:
    """Up to `lr` in the first share of the steps and down to almost nothing in the others, as cosines.

    Smith and Topin, "Super-Convergence", 2017, https://arxiv.org/abs/1708.07120.

    warmup: share of the steps in which it rises; 0.3 where 0 is asked
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper is no torch optimizer's subclass here
    return torch.optim.lr_scheduler.OneCycleLR(
        inner, max_lr=lr, total_steps=steps + 1, pct_start=warmup or 0.3, cycle_momentum=False
    )
