"""Experts: which of a layer's to keep.

REAP: Lasby, Lazarevich, Sinnadurai, Lie, Ioannou and Thangarasa, "REAP the Experts: Why Pruning Prevails for One-Shot
MoE Compression", 2025, https://arxiv.org/abs/2510.13999. An expert counts by the mean, over the tokens that are routed
to it, of its router weight times the length of its output:

    S_j = mean over tokens t routed to j of g_j(t) |f_j(t)|₂

with the weights as the model uses them, normalized over the chosen experts where it does that. `frequency` counts the
tokens.
"""

from typing import Any

import torch
from torch import Tensor

from wtool.statistics import Moments


class Routing:
    """What a layer's experts are asked and say, batch by batch."""

    def __init__(self) -> None:
        self._index = self._weights = torch.empty(0)
        self._strengths: dict[int, Tensor] = {}
        self._visits: dict[int, int] = {}

    def met(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any) -> None:
        """Take in where tokens are routed to.

        top_k_index, top_k_weights: [tokens, k], experts of each token and their weights
        """
        self._index, self._weights = top_k_index, top_k_weights

    def moments(self, expert: int, weight: Tensor, features: int, device: torch.device) -> Moments:
        """What is gathered of the input of an expert's last matrix [out, in]."""
        return _Said(self, expert, weight, features, device)

    def said(self, expert: int, lengths: Tensor) -> None:
        """Take in the lengths of an expert's outputs, its tokens in transformers' order: by choice, then token."""
        choices, tokens = torch.where(self._index.T == expert)
        strength = (self._weights[tokens, choices].float() * lengths).sum(dtype=torch.float64)
        self._strengths[expert] = self._strengths.get(expert, 0) + strength
        self._visits[expert] = self._visits.get(expert, 0) + len(tokens)

    def told(self, experts: int) -> tuple[Tensor, Tensor]:
        """Strengths (0 where no token came) and visits, float32 [experts] each."""
        visits = torch.tensor([float(self._visits.get(number, 0)) for number in range(experts)])
        strengths = torch.tensor([float(self._strengths.get(number, 0.0)) for number in range(experts)])
        return strengths / visits.clamp(min=1), visits


class _Said(Moments):
    """Moments that tell the routing how long the expert's outputs are."""

    def __init__(self, routing: Routing, expert: int, weight: Tensor, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self._routing, self._expert, self._weight = routing, expert, weight

    def add(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        super().add(inputs, mask)
        outputs = inputs.reshape(-1, inputs.shape[-1]) @ self._weight.T
        self._routing.said(self._expert, torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float32))
