"""Weights that lie in several tensors, bitmask-packed or as low-rank factors: made whole on reading."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import Checkpoint, TensorInfo, View
from wtool.dtypes import DTYPES, FLOATS
from wtool.errors import MalformedFile, MissingInput
from wtool.formats import bitmask, low_rank

if TYPE_CHECKING:
    import torch


def rebuilt(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a plain one, where its configuration says that weights lie in parts; else itself.

    raises: MalformedFile, MissingInput where configuration and tensors do not go together
    """
    pieces: dict[str, list[Piece]] = {}
    config = dict(checkpoint.config)
    if bitmask.is_meant(config.get("quantization_config")):
        pieces[bitmask.KIND] = _packed(checkpoint)
        del config["quantization_config"]
    if (ranks := config.pop(low_rank.KEY, None)) is not None:
        pieces["low rank"] = _factored(checkpoint, ranks)
    if not pieces:
        return checkpoint
    told = "; ".join(f"{kind} in {len(found)} layer(s)" for kind, found in pieces.items())
    return Rebuilt(checkpoint, [piece for found in pieces.values() for piece in found], config, told)


@dataclass(frozen=True)
class Piece:
    """A weight that lies in several tensors."""

    layer: str
    info: TensorInfo  # of the weight
    parts: Mapping[str, str]  # suffix -> tensor
    build: "Callable[[Mapping[str, torch.Tensor]], torch.Tensor]"


def _packed(checkpoint: Checkpoint) -> list[Piece]:
    pieces = []
    for layer in [name.removesuffix(".bitmask") for name in checkpoint.tensors if name.endswith(".bitmask")]:
        parts = {suffix: f"{layer}.{suffix}" for suffix in bitmask.SUFFIXES}
        infos = {suffix: _info(checkpoint, name) for suffix, name in parts.items()}
        _check(checkpoint, parts["bitmask"], infos["bitmask"], "U8 of 2 dimensions", ("U8",), (None, None))
        shape = _shape(checkpoint, parts["shape"], infos)
        _check(checkpoint, parts["compressed"], infos["compressed"], "of 1 dimension", tuple(DTYPES), (None,))
        for suffix, right in bitmask.layout(shape, 0, infos["compressed"].dtype).items():
            if suffix != "compressed":
                told = f"{right.dtype} {list(right.shape)} for {list(shape)}"
                _check(checkpoint, parts[suffix], infos[suffix], told, (right.dtype,), right.shape)
        pieces.append(Piece(layer, TensorInfo(infos["compressed"].dtype, shape), parts, bitmask.unpack))
    return pieces


def _shape(checkpoint: Checkpoint, name: str, infos: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """What the shape tensor says; the next multiple of 8 columns where only headers are there."""
    rows, octets = infos["bitmask"].shape
    _check(checkpoint, name, infos["shape"], "I64 [2]", ("I64",), (2,))
    try:
        told = checkpoint.read(name).tolist()
    except MissingInput:
        return rows, octets * 8
    return told[0], told[1]


def _factored(checkpoint: Checkpoint, ranks: Any) -> list[Piece]:
    if not isinstance(ranks, dict) or not all(isinstance(rank, int) for rank in ranks.values()):
        raise MalformedFile(f"{checkpoint.label}: config.json: {low_rank.KEY} is not an object of layers and ranks")
    pieces = []
    for layer, rank in ranks.items():
        parts = {suffix: f"{layer}.{suffix}" for suffix in (low_rank.U, low_rank.V)}
        u, v = (_info(checkpoint, name) for name in parts.values())
        _check(checkpoint, parts[low_rank.U], u, f"[outputs, {rank}] of a float type", FLOATS, (None, rank))
        _check(checkpoint, parts[low_rank.V], v, f"{u.dtype} [{rank}, inputs]", (u.dtype,), (rank, None))
        pieces.append(Piece(layer, TensorInfo(u.dtype, (u.shape[0], v.shape[1])), parts, low_rank.multiply))
    return pieces


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise MissingInput(
            f"{checkpoint.label}: no tensor '{name}': its weight lies in parts and cannot be read without"
        )
    return checkpoint.tensors[name]


def _check(
    checkpoint: Checkpoint,
    name: str,
    info: TensorInfo,
    right: str,
    dtypes: tuple[str, ...],
    shape: tuple[int | None, ...],
) -> None:
    """Check a header; a size of None may be any."""
    fits = len(info.shape) == len(shape)
    fits = fits and all(size in (None, found) for size, found in zip(shape, info.shape, strict=True))
    if info.dtype not in dtypes or not fits:
        raise MalformedFile(f"{checkpoint.label}: '{name}' is {info.dtype} {list(info.shape)}, not {right}")


class Rebuilt(View):
    """A checkpoint with weights that lie in parts, which looks like a plain one."""

    def __init__(self, stored: Checkpoint, pieces: list[Piece], config: dict[str, Any], told: str):
        super().__init__(stored)
        self.config, self.quantization = config, told
        self._pieces = {f"{piece.layer}.weight": piece for piece in pieces}
        whole = {part: weight for weight, piece in self._pieces.items() for part in piece.parts.values()}
        self.tensors = tensors = {}
        for name, info in stored.tensors.items():
            if name in self._pieces:
                layer = self._pieces[name].layer
                raise MalformedFile(f"{self.label}: '{layer}' has both 'weight' and its parts")
            weight = whole.get(name, name)
            tensors.setdefault(weight, self._pieces[weight].info if weight in self._pieces else info)

    def read(self, name: str) -> "torch.Tensor":
        if name not in self.tensors:
            raise self.missing(name)
        piece = self._pieces.get(name)
        if piece is None:
            return self.source.read(name)
        try:
            return piece.build({suffix: self.source.read(part) for suffix, part in piece.parts.items()})
        except ValueError as error:
            raise MalformedFile(f"{self.label}: '{piece.layer}': {error}") from None

    def parts(self, name: str) -> Iterable[str]:
        return self._pieces[name].parts.values() if name in self._pieces else (name,)
