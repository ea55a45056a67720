"""Making up for input channels that went: the columns that stay are fitted to the outputs of the whole matrix.

With K the columns that stay and G the mean of x xᵀ on calibration text, the W' that makes the mean of |W x - W' x_K|²
least is W G[:, K] G[K, K]⁻¹ (least squares; as the update of Optimal Brain Surgeon for many weights at once, Kurtic,
Frantar and Alistarh, "ZipLM", 2023, https://arxiv.org/abs/2302.04089).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wtool.dtypes import torch_dtype
from wtool.network import Read
from wtool.rewrite import Change, Made
from wtool.statistics import Gram, relative_errors

from .cut import select
from .structure import Numbers

FEWEST_TOKENS = 32  # a matrix that saw fewer is cut only
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean of the diagonal; more where less does not do


@dataclass(frozen=True)
class Fitted:
    """A matrix whose inputs are cut, and where its result goes."""

    output: str  # the name of the tensor
    axes: tuple[Numbers | None, ...]  # what stays along each axis, as it lies
    dtype: str  # safetensors name
    transposed: bool  # it lies as [in, out]

    @property
    def rows(self) -> Numbers | None:
        """The outputs that stay."""
        return self.axes[-1] if self.transposed else self.axes[0]

    @property
    def columns(self) -> Numbers:
        """The inputs that stay."""
        columns = self.axes[0] if self.transposed else self.axes[-1]
        assert columns is not None, "its inputs are cut"
        return columns


def compensated(weight: Tensor, gram: Tensor, columns: Sequence[int]) -> Tensor | None:
    """The matrix with zeros in the columns that went, the others fitted.

    weight: [out, in]
    gram:   float32 [in, in]
    returns: float32 [out, in]; None where no damping makes the Gram matrix positive definite
    """
    stay = torch.tensor(columns, device=weight.device)
    matrix = gram[stay][:, stay].double()
    wanted = (weight.double() @ gram[:, stay].double()).T
    mean = matrix.diagonal().mean()
    for damping in DAMPINGS:
        damped = matrix + torch.eye(len(stay), device=weight.device, dtype=torch.float64) * (damping * mean)
        # what damping would draw to zero, it draws to the weights as they were
        root, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            target = wanted + damping * mean * weight[:, stay].double().T
            full = torch.zeros(weight.shape, device=weight.device)
            full[:, stay] = torch.cholesky_solve(target, root).T.float()
            return full
    return None


@dataclass(frozen=True)
class Compensating(Change[Gram]):
    """Cuts the inputs of linears and fits what is left."""

    fitted: Mapping[str, Fitted]  # by tensor, as the layers that stay are numbered
    read: Read  # of the matrices as they lie

    def outputs(self, tensor: str) -> Collection[str]:
        return (self.fitted[tensor].output,) if tensor in self.fitted else ()

    def gather(self, features: int, device: torch.device) -> Gram:
        return Gram(features, device)

    def site(self, tensors: Sequence[str], weights: Sequence[Tensor], gathered: Gram) -> Sequence[Made]:
        tokens = gathered.tokens
        gram = gathered.finish() if tokens >= FEWEST_TOKENS else None
        return [self._made(name, weight, gram, tokens) for name, weight in zip(tensors, weights, strict=True)]

    def unseen(self, tensor: str, weight: Tensor, why: str) -> Made:
        return self._made(tensor, weight, None, 0)

    def decode(self, tensor: str, written: Mapping[str, Tensor]) -> Tensor:
        fitted = self.fitted[tensor]
        cut = written[fitted.output]
        whole = self.read(tensor)
        return _widened(cut.T, whole.T, fitted) if fitted.transposed else _widened(cut, whole, fitted)

    def _made(self, name: str, weight: Tensor, gram: Tensor | None, tokens: int) -> Made:
        fitted = self.fitted[name]
        found = None if gram is None else compensated(weight, gram, fitted.columns)
        masked = torch.zeros_like(weight)
        masked[:, list(fitted.columns)] = weight[:, list(fitted.columns)]
        full = (masked if found is None else found).to(torch_dtype(fitted.dtype))
        stored = full.T if fitted.transposed else full
        cut = select(stored, axes=fitted.axes, factor=1.0, offset=0, dtype=torch_dtype(fitted.dtype))
        value = _widened(cut.T if fitted.transposed else cut, weight, fitted)
        return Made(
            value,
            partial(_named, fitted.output, cut),
            partial(_told, gram=gram, value=full, tokens=tokens, fitted=fitted),
        )


def _named(output: str, cut: Tensor) -> dict[str, Tensor]:
    return {output: cut.cpu()}


def _widened(cut: Tensor, weight: Tensor, fitted: Fitted) -> Tensor:
    """A cut matrix in the place of the whole [out, in]; rows that went keep what they had in the columns that stay."""
    columns = list(fitted.columns)
    full = torch.zeros(weight.shape, dtype=cut.dtype, device=cut.device)
    full[:, columns] = weight[:, columns].to(cut.dtype)
    rows = torch.arange(len(weight)) if fitted.rows is None else torch.tensor(fitted.rows)
    full[rows[:, None], torch.tensor(columns)] = cut
    return full


def _told(weight: Tensor, *, gram: Tensor | None, value: Tensor, tokens: int, fitted: Fitted) -> dict[str, Any]:
    """What the report tells: how far outputs are off, fitted and only cut."""
    told: dict[str, Any] = {"inputs": [weight.shape[1], len(fitted.columns)], "tokens": tokens}
    if gram is None:
        return told | {"fallback": f"only {tokens} tokens came to it"}
    masked = torch.zeros(weight.shape)
    masked[:, list(fitted.columns)] = weight[:, list(fitted.columns)].float()
    after, before = relative_errors(weight, gram, [value.float(), masked])
    return told | {"output_error": round(after.output, 6), "cut_output_error": round(before.output, 6)}
