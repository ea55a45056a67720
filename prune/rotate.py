"""Rotation: the residual stream in its principal directions, so that the last of them can go like channels.

A norm over root mean squares sees a token's length and passes on its direction, and both are known in any
orthonormal basis. So with the norms' own weights moved into the matrices that read them, a model computes the same
when its stream x is x Q: what writes to the stream is multiplied by Q on that side, what reads it by Qᵀ, and the two
meet as Q Qᵀ = 1. This is the computational invariance of SliceGPT (Ashkboos, Croci, Gennari do Nascimento, Hoefler and
Hensman, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", 2024,
https://arxiv.org/abs/2401.15024, theorem 1). SliceGPT turns every block's stream by a Q of its own, which takes one
more matrix a block and so a class of its own; here one Q turns the whole model, and the result opens as what it was.

Q has the eigenvectors of the mean of x xᵀ over the tokens between blocks, those of the greatest eigenvalues first.
Each token is scaled to a mean square of 1 first, as nothing reads the stream but through a norm: what a direction is
worth is its share of each token. Without that, the few tokens of enormous length that language models have (often the
first of a text) would choose the directions alone.
"""

import torch
from torch import Tensor

PIECE = 1 << 22  # elements that are turned at a time, in float64


def unit(tokens: Tensor) -> Tensor:
    """Tokens [..., hidden] scaled to a mean square of 1 each, in float32; zeros stay."""
    tokens = tokens.float()
    return tokens * tokens.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()


def principal_directions(moment: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix, those of the greatest eigenvalues first.

    moment:  [hidden, hidden], the mean of x xᵀ
    returns: float64 [hidden, hidden], on the CPU; column i is direction i, orthonormal
    """
    return torch.linalg.eigh(moment.cpu().double()).eigenvectors.flip(1)


def turned(weight: Tensor, directions: Tensor, *, axis: int, gain: Tensor | None = None) -> Tensor:
    """A tensor whose channels of the residual stream, along one axis, are made directions of it.

    weight:     [out, hidden] of what reads the stream (and embeddings), [hidden, in] of what writes to it, or [hidden]
    directions: float64 [hidden, hidden], one a column
    axis:       where the channels are
    gain:       [hidden], the weight of the norm between the stream and what reads it
    returns:    of the weight's shape and dtype; computed in float64 and rounded once
    """
    lies = weight.movedim(axis, -1)
    rows = torch.atleast_2d(lies)
    found = torch.empty(rows.shape, dtype=weight.dtype)
    count = max(1, PIECE // rows.shape[1])
    for begin in range(0, len(rows), count):
        piece = rows[begin : begin + count].double()
        piece = piece if gain is None else piece * gain.double()
        found[begin : begin + count] = piece @ directions
    return found.reshape(lies.shape).movedim(-1, axis).contiguous()
