"""compressed-tensors, `sparse-bitmask`: a matrix with zeros as one bit a weight, and the weights that are kept.

A `P.weight` [out, in] becomes
    P.compressed    [kept], row after row
    P.bitmask       uint8 [out, ceil(in / 8)]: weight (i, j) is kept where bit j % 8 of byte j // 8 of row i is set
    P.row_offsets   int64 [out], where in `compressed` each row begins
    P.shape         int64 [2]: out, in
as compressed-tensors wrote it up to 0.11 (later releases know the name only). It saves disk; on reading the matrix is
made again. At half of the weights kept a 16-bit matrix takes 9/16 of its bytes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wtool.dtypes import TensorInfo

if TYPE_CHECKING:
    import torch

METHOD = "compressed-tensors"
KIND = "sparse-bitmask"
FOLLOWED = "0.11.0"  # the version of the package whose layout this is
SUFFIXES = ("compressed", "bitmask", "row_offsets", "shape")


def layout(shape: tuple[int, int], kept: int, dtype: str) -> dict[str, TensorInfo]:
    """The tensors that a weight of a type becomes, by suffix."""
    rows, columns = shape
    return {
        "compressed": TensorInfo(dtype, (kept,)),
        "bitmask": TensorInfo("U8", (rows, -(-columns // 8))),
        "row_offsets": TensorInfo("I64", (rows,)),
        "shape": TensorInfo("I64", (2,)),
    }


def pack(weight: "torch.Tensor", keep: "torch.Tensor | None" = None) -> "dict[str, torch.Tensor]":
    """The tensors that a matrix becomes, by suffix.

    weight: [out, in], of any type
    keep:   bool [out, in], True where a weight is stored; None stores all but zeros
    """
    import numpy
    import torch

    keep = weight != 0 if keep is None else keep
    counts = keep.sum(dim=1)
    return {
        "compressed": weight[keep],
        "bitmask": torch.from_numpy(numpy.packbits(keep.numpy(), axis=1, bitorder="little")),
        "row_offsets": counts.cumsum(0) - counts,
        "shape": torch.tensor(weight.shape),
    }


def unpack(parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
    """Undo `pack`.

    raises: ValueError, with a clause, where the tensors do not go together
    """
    import numpy
    import torch

    rows, columns = (int(size) for size in parts["shape"])
    if parts["bitmask"].shape != (rows, -(-columns // 8)):
        raise ValueError(f"shape says [{rows}, {columns}], bitmask is {list(parts['bitmask'].shape)}")
    bits = numpy.unpackbits(parts["bitmask"].numpy(), axis=1, count=columns, bitorder="little")
    keep = torch.from_numpy(bits).bool()
    counts, values = keep.sum(dim=1), parts["compressed"]
    if int(counts.sum()) != len(values):
        raise ValueError(f"bitmask keeps {int(counts.sum())} weights, compressed holds {len(values)}")
    if not torch.equal(parts["row_offsets"].long(), counts.cumsum(0) - counts):
        raise ValueError("row_offsets are not where the rows of bitmask begin")
    return torch.zeros(rows, columns, dtype=values.dtype).masked_scatter_(keep, values)


def settings(share: float, pattern: tuple[int, int] | None = None) -> dict[str, Any]:
    """config.json's `quantization_config`.

    share:   of the packed weights that is 0
    pattern: (kept, of), where they follow one
    """
    sparsity = {
        "format": KIND,
        "global_sparsity": share,
        "sparsity_structure": f"{pattern[0]}:{pattern[1]}" if pattern else "unstructured",
        "targets": ["Linear"],
        "ignore": [],
    }
    return {"quant_method": METHOD, "version": FOLLOWED, "sparsity_config": sparsity, "transform_config": {}}


def is_meant(settings: Any) -> bool:
    """Whether a `quantization_config` says that weights are packed so, and nothing more."""
    if not isinstance(settings, dict) or settings.get("config_groups") or settings.get("transform_config"):
        return False
    sparsity = settings.get("sparsity_config")
    return isinstance(sparsity, dict) and sparsity.get("format") == KIND
