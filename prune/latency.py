"""How long a token takes, as far as its weights tell: by how many of them it is multiplied with.

Decoding for one user reads each of these from memory for every token, and a prompt's time is that of their products, so
both times grow with their number. What does not: attention to the tokens before, and what a runtime spends on a layer
however small it is. Of experts those count that a token goes to; of embeddings none, as one row is looked up.
"""

from wtool.checkpoint.base import Checkpoint
from wtool.checkpoint.tied import embedding_name, head_name, is_tied
from wtool.linear_names import linear_layers

from .structure import place_of, shape_of


def weights_of_a_token(checkpoint: Checkpoint) -> int:
    """The weights in layers and head that a token is multiplied with. raises: UsageError for an unknown family"""
    shape, linears = shape_of(checkpoint.config), linear_layers(checkpoint)[0]
    every = inside = 0
    for name, linear in linears.items():
        weights = linear.shape[0] * linear.shape[1]
        every += weights
        inside += weights if place_of(name)[1] is not None else 0
    met = inside * (shape.top_k or 0) // shape.experts if shape.experts else inside
    head = head_name(checkpoint.tensors) or (embedding_name(checkpoint.tensors) if is_tied(checkpoint.config) else None)
    return every - inside + met + (checkpoint.tensors[head].elements if head else 0)
