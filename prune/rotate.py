"""Rotation: the residual stream in its principal directions, so that the last of them can go like channels.

A model computes the same in any orthonormal basis of its residual stream; `wtool.rotated` tells why, and does it.
This is the computational invariance of SliceGPT (Ashkboos, Croci, Gennari do Nascimento, Hoefler and
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
