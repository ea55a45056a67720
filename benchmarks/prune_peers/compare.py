"""Two pruned checkpoints beside each other, matrix by matrix.

    python compare.py ONE OTHER

Prints one JSON object: how many weights the layers' matrices have; by matrix how many of them are zero in one and not
in the other, where any are; by layer the norm of the difference beside that of the first's weights; and, of all
tensors, those whose values differ and those that one of the two lacks.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def layer_of(name: str) -> str:
    """The number of the layer that a tensor is in."""
    return next(part for part in name.split(".") if part.isdigit())


def compared(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, object]:
    """What the module's header says."""
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    matrices = [name for name in shared if ".layers." in name and one[name].ndim == 2]
    mismatches = {name: int(((one[name] == 0) != (other[name] == 0)).sum()) for name in matrices}
    layers = sorted({layer_of(name) for name in matrices}, key=int)
    return {
        "weights": sum(one[name].numel() for name in matrices),
        "matrices": len(matrices),
        "mismatches": {name: count for name, count in mismatches.items() if count},
        "relative_difference": {layer: difference(one, other, layer, matrices) for layer in layers},
        "differing_tensors": sum(not torch.equal(one[name], other[name]) for name in shared),
        "not_in_both": sorted({*one, *other} - {*shared}),
    }


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor], layer: str, names: list[str]) -> float:
    """The norm of what a layer's matrices differ by, as a share of the norm of the first's."""
    own = [name for name in names if layer_of(name) == layer]
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in own)
    return (apart / sum(float(one[name].double().square().sum()) for name in own)) ** 0.5


if __name__ == "__main__":
    print(json.dumps(compared(*(tensors(Path(folder)) for folder in sys.argv[1:3]))))
