"""The full model with parts of it masked: what a cut checkpoint must compute, made in another way than by cutting."""

from copy import deepcopy
from math import sqrt
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prune.structure import Kept, Shape

ATTENTION_OUT = ("self_attn.o_proj", "attn.c_proj", "attention.output.dense")
FFN_OUT = ("mlp.down_proj", "mlp.c_proj", "output.dense")
OTHER_WRITERS = ("cls.predictions.transform.dense",)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


@torch.no_grad()
def masked(model: PreTrainedModel, kept: Kept, shape: Shape) -> PreTrainedModel:
    """A copy in which what is not kept adds nothing, and layers that are not kept are gone."""
    model = deepcopy(model)
    for number, block in enumerate(blocks(model)):
        _mask_heads(block, kept, shape, number)
        _mask_ffn(block, kept, shape, number)
    if kept.hidden is not None:
        _mask_hidden(model, kept.hidden, shape)
    layers = blocks(model)
    picked = [layers[number] for number in kept.layers]
    text = model.config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[number] for number in kept.layers]
    del layers[:]
    layers.extend(picked)
    return model


def _gone(size: int, stays: Any) -> list[int]:
    return [number for number in range(size) if number not in stays]


def _find(block: nn.Module, names: tuple[str, ...]) -> Any:
    found = {name: module for name, module in block.named_modules() if name.endswith(names)}
    return found.get(min(found, key=len, default=""))  # bert's output.dense, and not its attention.output.dense


def _inputs(module: Any) -> Tensor:
    """A view of the module's weight as [in, out]."""
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.T


def _mask_heads(block: nn.Module, kept: Kept, shape: Shape, number: int) -> None:
    group = shape.heads // shape.kv_heads
    heads, kv = kept.heads.get(number, range(shape.heads)), kept.kv_heads.get(number, range(shape.kv_heads))
    gone = [head for head in range(shape.heads) if head not in heads or head // group not in kv]
    into = _inputs(_find(block, ATTENTION_OUT)).view(shape.heads, shape.head_dim, -1)
    into[gone] = 0
    norm = _find(block, ("self_attn.q_norm",))
    if norm is None or norm.weight.numel() == shape.head_dim:
        return
    # olmo2 has one norm over all heads: what goes must not count in it, and its mean is over the others
    kv_gone = [kv for kv in range(shape.kv_heads) if all(kv * group + i in gone for i in range(group))]
    for name, heads, goes in (("q", shape.heads, gone), ("k", shape.kv_heads, kv_gone)):
        getattr(block.self_attn, f"{name}_proj").weight.view(heads, shape.head_dim, -1)[goes] = 0
        _rescale(getattr(block.self_attn, f"{name}_norm"), 1 - len(goes) / heads)


def _rescale(norm: Any, share: float) -> None:
    """Make an RMS norm over channels of which only a share is not zero as if it were over these alone.

    With m = share · n of them: 1/√(Σx²/m + ε) = √share / √(Σx²/n + share · ε).
    """
    offset = 1 if "Gemma" in type(norm).__name__ else 0
    norm.weight.copy_((norm.weight + offset) * sqrt(share) - offset)
    name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    setattr(norm, name, getattr(norm, name) * share)


def _mask_ffn(block: Any, kept: Kept, shape: Shape, number: int) -> None:
    moe: Any = next((module for module in block.modules() if hasattr(module, "experts")), None)
    if moe is None:
        _inputs(_find(block, FFN_OUT))[_gone(shape.ffn or 0, kept.ffn.get(number, range(shape.ffn or 0)))] = 0
        return
    stay = kept.experts.get(number, tuple(range(shape.experts or 0)))
    for expert in stay:
        channels = kept.expert_ffn.get((number, expert), range(shape.expert_ffn or 0))
        moe.experts.down_proj[expert][:, _gone(shape.expert_ffn or 0, channels)] = 0
    moe.gate.register_forward_hook(lambda gate, _, output: _route(gate, output[0], stay))


def _route(gate: Any, logits: Tensor, stay: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The router's choice where the other experts have no chance. (Mixtral's always shares out a whole.)"""
    mask = torch.full_like(logits, -torch.inf)
    mask[:, list(stay)] = 0
    scores, chosen = (logits + mask).softmax(-1).topk(gate.top_k)
    if getattr(gate, "norm_topk_prob", True):
        scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores, chosen


def _mask_hidden(model: PreTrainedModel, hidden: tuple[int, ...], shape: Shape) -> None:
    """Let nothing write into the channels that go, and norms count the others only."""
    gone = _gone(shape.hidden, hidden)
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        if "vision_tower" in name or name.endswith("mm_soft_emb_norm"):
            continue
        if name.endswith("multi_modal_projector"):
            module.mm_input_projection_weight[:, gone] = 0
        elif isinstance(module, nn.Embedding):
            module.weight[:, gone] = 0
        elif name.endswith((*ATTENTION_OUT, *FFN_OUT, *OTHER_WRITERS)):
            _inputs(module)[:, gone] = 0
            if module.bias is not None:
                module.bias[gone] = 0
        elif isinstance(module, nn.LayerNorm):
            module.forward = MethodType(_layer_norm_over(hidden), module)
        elif name.endswith("mlp.experts"):
            module.down_proj[:, gone] = 0  # [experts, hidden, channels]
        elif "norm" in name and not name.endswith(("q_norm", "k_norm")):
            _rescale(module, len(hidden) / shape.hidden)


def _layer_norm_over(hidden: tuple[int, ...]) -> Any:
    kept = list(hidden)

    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        part = x[..., kept]
        centred = part - part.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        result[..., kept] = scaled * self.weight[kept] + self.bias[kept]
        return result

    return forward
