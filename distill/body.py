"""A model as a body and a head: what it makes of tokens, and how that becomes logits.

The logits of a batch are the largest thing in a distillation, so they are never made whole: the body runs, and
`linear_divergence` goes over its last hidden states some tokens at a time. What a family does to its logits beside
multiplying (scales, soft caps) is told by its configuration, in the table below, and tried on a few tokens before it
is believed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .head import Head

# key of config.json -> the power of it that the logits are multiplied with
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
MULTIPLIES = ("hyperclovax",)  # families whose logits_scaling multiplies, where the others' divides
INPUTS = ("input_ids", "position_ids")  # of a batch, what a model's body takes


def head_of(model: PreTrainedModel) -> Head | None:
    """How a model's last hidden states become logits, as far as its configuration tells; None where that is not known.

    Where parameters are sharded, the weight is there inside `at_head` only.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:  # an adapter's does more
        return None
    config = model.config.get_text_config()
    scale = 1.0
    for key, power in SCALES.items():
        factor = getattr(config, key, None)
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            scale *= float(factor) ** (1 if str(config.model_type).startswith(MULTIPLIES) else power)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, module.bias, scale, None if softcap is None else float(softcap))


def body_of(model: PreTrainedModel, inputs: Mapping[str, Tensor], *, all_states: bool = False) -> Any:
    """Run a model without its head.

    returns: transformers' output, with last_hidden_state [windows, tokens, hidden]
    """
    taken = {key: inputs[key] for key in INPUTS if inputs.get(key) is not None}
    return model.base_model(**taken, use_cache=False, output_hidden_states=all_states)


def at_head(model: PreTrainedModel, hidden: Tensor, run: Callable[[Tensor, Head], Any]) -> Any:
    """Run something in the place of the model's head, when whoever shards or moves its weight has it ready.

    hidden: what the head is to be called with
    run: what is run instead, on that and the head
    returns: what it returns; tensors, or tuples of them
    """
    module: Any = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Any:
        head = head_of(model)
        assert head is not None
        return run(hidden, head)

    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward


@torch.no_grad()
def full_logits(head: Head, hidden: Tensor) -> Tensor:
    """All logits of some tokens, without a graph.

    hidden: [tokens, hidden]
    returns: [tokens, vocabulary], float32 or better
    """
    ready = head.prepared(hidden, head.vocabulary)
    return ready.logits(hidden.detach().to(ready.weight.dtype))


def is_head_right(model: PreTrainedModel) -> bool:
    """Whether hidden states and `head_of` give the logits that the model gives itself, tried on a few tokens."""
    if model.base_model is model:
        return False
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 9, device=model.device)[None] * 7919 % vocabulary
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        output = body_of(model, {"input_ids": ids})
        head = head_of(model)
        if head is None or "last_hidden_state" not in output:
            return False
        ours = full_logits(head, output.last_hidden_state[0]).float()
    if own.shape != ours.shape:
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    return torch.allclose(own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max()))


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether positions that count anew keep a model from looking at what is before them, tried on a few tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 17, device=model.device)[None] * 7919 % vocabulary
    other = ids.clone()
    other[:, :8] = (ids[:, :8] + 1) % vocabulary
    positions = torch.arange(16, device=model.device)[None] % 8
    with torch.no_grad():
        first, second = (
            body_of(model, {"input_ids": each, "position_ids": positions}).last_hidden_state[:, 8:].float()
            for each in (ids, other)
        )
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()))
