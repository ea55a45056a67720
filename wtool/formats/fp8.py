"""FP8: a weight as float8_e4m3fn, times a scale that the whole matrix, each row, or each block of it shares.

    weight[r, i] ≈ code[r, i] * scale[r // rows, i // columns]

A code has 3 bits of mantissa, so it is off by 1/16 of itself at most, from 2^-6 to 448; below, steps are 2^-9 wide.
There is no infinity, and nothing rounds to NaN: what is beyond 448 is cut off there.

| file               | scales                     | of the matrix | of a row | of a block       | read by            |
|--------------------|----------------------------|---------------|----------|------------------|--------------------|
| compressed-tensors | weight_scale, model's type | [1]           | [out, 1] | [blocks, blocks] | transformers, vLLM |
| fp8                | weight_scale_inv, F32      | []            |          | [blocks, blocks] | transformers, vLLM |

The latter is DeepSeek's, and the name of its scales is no inverse: weights are multiplied by them.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from wtool.dtypes import TensorInfo
from wtool.formats.compressed_tensors import FOLLOWED, METHOD

LARGEST = 448.0  # of the codes
KIND = "float-quantized"  # compressed-tensors' name of it
_CHUNK = 1 << 20  # weights that are worked on in float32 at a time

Shape = tuple[int, int]
Activations = Literal["token", "group"]


@dataclass(frozen=True)
class Blocks:
    """Which weights share a scale."""

    rows: int  # outputs; -1 is all
    columns: int  # inputs; -1 is all

    def size(self, shape: Shape) -> Shape:
        """Rows and columns of a block of a matrix; those at its end may be smaller."""
        return tuple(max(1, whole if part == -1 else part) for part, whole in zip(self._parts, shape, strict=True))  # pyright: ignore[reportReturnType]

    def count(self, shape: Shape) -> Shape:
        """Blocks below each other and beside each other."""
        return tuple(ceil(whole / part) for whole, part in zip(shape, self.size(shape), strict=True))  # pyright: ignore[reportReturnType]

    @property
    def _parts(self) -> Shape:
        return self.rows, self.columns

    def __str__(self) -> str:
        whole = {(-1, -1): "a scale for the matrix", (1, -1): "a scale for each row"}
        return whole.get(self._parts, f"a scale for each block of {self.rows} x {self.columns}")


@dataclass(frozen=True)
class Fp8:
    """How a linear layer is stored, and how a runtime is to round what comes into it."""

    blocks: Blocks
    activations: Activations  # a scale, found as they come, for each token; or for each 128 inputs of a token

    def __str__(self) -> str:
        return f"FP8, {self.blocks}; activations in FP8, a scale for each {_OF_ACTIVATIONS[self.activations]}"


_OF_ACTIVATIONS = {"token": "token", "group": "128 of a token"}
SCHEMES: dict[str, Fp8] = {
    "fp8-dynamic": Fp8(Blocks(1, -1), "token"),
    "fp8-block": Fp8(Blocks(128, 128), "group"),
    "fp8-tensor": Fp8(Blocks(-1, -1), "token"),
}


# Numbers


def encode(weight: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
    """The nearest code of every weight, float8_e4m3fn [out, in]; halves go to the even code.

    weight: [out, in], finite
    scales: [blocks, blocks], above 0
    """
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for here, spread in _pieces(weight.shape, scales, blocks):
        codes[here] = torch.div(weight[here].float(), spread).clamp_(-LARGEST, LARGEST).to(codes.dtype)
    return codes


def decode(codes: Tensor, scales: Tensor, blocks: Blocks) -> Tensor:
    """What codes stand for, float32.

    codes:  [..., out, in], of a float type of 8 bits
    scales: [..., blocks, blocks]
    """
    weight = torch.empty(codes.shape, dtype=torch.float32)
    for matrix, own, into in zip(_matrices(codes), _matrices(scales.float()), _matrices(weight), strict=True):
        for here, spread in _pieces(matrix.shape, own, blocks):
            torch.mul(matrix[here].float(), spread, out=into[here])
    return weight


def largest_in_blocks(weight: Tensor, blocks: Blocks) -> Tensor:
    """The largest magnitude in each block of weights [out, in], float32 [blocks, blocks]."""
    (rows, columns), (height, width) = weight.shape, blocks.size(tuple(weight.shape))  # pyright: ignore[reportArgumentType]
    if height == rows > 1:  # what the blocks of its rows have, so that never the whole is made float32
        return largest_in_blocks(weight, Blocks(1, width)).amax(dim=0, keepdim=True)
    found = torch.zeros(blocks.count((rows, columns)))
    step = height * max(1, _CHUNK // max(1, height * columns))
    for begin in range(0, rows if columns else 0, step):
        part = weight[begin : begin + step].float().abs()
        part = pad(part, (0, -columns % width, 0, -len(part) % height))
        part = part.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        found[begin // height : begin // height + len(part)] = part.amax(dim=(1, 3))
    return found


def relative_error(weight: Tensor, codes: Tensor, scales: Tensor, blocks: Blocks) -> float:
    """The norm of what rounding changed, as a share of the norm of the weights [out, in]; 0 where all are 0."""
    lost = whole = 0.0
    for here, spread in _pieces(weight.shape, scales, blocks):
        part = weight[here].float()
        whole += float(torch.linalg.vector_norm(part)) ** 2
        lost += float(torch.linalg.vector_norm(part - codes[here].float().mul_(spread))) ** 2
    return (lost / whole) ** 0.5 if whole else 0.0


def _pieces(shape: torch.Size, scales: Tensor, blocks: Blocks) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their scales as they are to be multiplied with them."""
    rows, columns = shape
    height, width = blocks.size((rows, columns))
    step = max(1, _CHUNK // max(1, columns))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        own = scales[torch.arange(begin, end) // height].float()
        yield slice(begin, end), own if own.shape[1] == 1 else own.repeat_interleave(width, dim=1)[:, :columns]


def _matrices(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:]) if tensor.dim() > 2 else tensor[None]


# Files


def scale_dtype(format: str, dtype: str) -> str:
    """The type of the scales, for a model of a type."""
    return dtype if format == METHOD and dtype in ("F16", "BF16") else "F32"


def layout(format: str, shape: Shape, blocks: Blocks, scale_dtype: str) -> dict[str, TensorInfo]:
    """The tensors that a weight becomes, by suffix; codes, then scales."""
    if format == METHOD:
        count = (1,) if blocks == Blocks(-1, -1) else blocks.count(shape)
        return {"weight": TensorInfo("F8_E4M3", shape), "weight_scale": TensorInfo(scale_dtype, count)}
    count = () if blocks == Blocks(-1, -1) else blocks.count(shape)
    return {"weight": TensorInfo("F8_E4M3", shape), "weight_scale_inv": TensorInfo(scale_dtype, count)}


def unfit(format: str, shape: Shape, blocks: Blocks) -> str | None:
    """Tell in a clause why a weight cannot be stored so, and what could be; None where it can."""
    odd = [size for size, part in zip(shape, blocks.size(shape), strict=True) if size % part and size > part]
    if format != METHOD and odd:  # transformers takes the size of blocks from their number
        return f"blocks of {blocks.rows} x {blocks.columns} do not divide its {odd[0]}, as fp8 asks: take {METHOD}"
    return None


def settings(format: str, scheme: Fp8, plain: Collection[str]) -> dict[str, Any]:
    """config.json's `quantization_config`.

    plain: the linear layers that are not stored so, the output head among them
    """
    if format == METHOD:
        return _compressed_tensors(scheme, plain)
    blocks = scheme.blocks
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": None if blocks == Blocks(-1, -1) else [blocks.rows, blocks.columns],
        "modules_to_not_convert": list(plain),
    }


def _compressed_tensors(scheme: Fp8, plain: Collection[str]) -> dict[str, Any]:
    blocks = scheme.blocks
    strategy = {(-1, -1): "tensor", (1, -1): "channel"}.get((blocks.rows, blocks.columns), "block")
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**number, "strategy": strategy, "dynamic": False, "group_size": None}
    weights["block_structure"] = [blocks.rows, blocks.columns] if strategy == "block" else None
    size = 128 if scheme.activations == "group" else None
    group: Mapping[str, Any] = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {**number, "strategy": scheme.activations, "dynamic": True, "group_size": size},
        "output_activations": None,
        "format": KIND,
    }
    return {
        "quant_method": METHOD,
        "format": KIND,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": FOLLOWED,
    }
