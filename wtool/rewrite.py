"""Changing a model's linears on the walk and writing them: the visitor that rooms share.

A room says what it gathers of an input, what it makes of the linears that share it, and how that lies on disk
(`Change`). Here it is put into the model, reported and written, and read again when a run that was stopped goes on.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from wtool.block_pass import S, Site, Visitor
from wtool.finite import refuse_nonfinite
from wtool.network import Block, Linear, Network, Read
from wtool.ranks import ALONE, Ranks
from wtool.writer import checksum


@dataclass(frozen=True)
class Made:
    """What was made of a matrix. The functions are called later, by another thread."""

    value: Tensor  # [out, in], what the model goes on with
    encode: Callable[[], Mapping[str, Tensor]]  # what is written in its place, by names in the output
    explain: Callable[[Tensor], Mapping[str, Any]]  # of the matrix as it was, [out, in]: what the report tells (JSON)


class Change(Protocol[S]):
    """What a room does to linears, which it knows by the names of their tensors."""

    def outputs(self, tensor: str) -> Collection[str]:
        """The tensors that are written in the place of a linear's; none where it stays as it is."""
        ...

    def gather(self, features: int, device: torch.device) -> S:
        """Begin to gather of an input."""
        ...

    def site(self, tensors: Sequence[str], weights: Sequence[Tensor], gathered: S) -> Sequence[Made]:
        """Change linears that share an input.

        weights: [out, in] each, not to be changed in place
        """
        ...

    def unseen(self, tensor: str, weight: Tensor, why: str) -> Made:
        """Change a linear of whose input nothing is known."""
        ...

    def decode(self, tensor: str, written: Mapping[str, Tensor]) -> Tensor:
        """The matrix [out, in] again, from what was written in its place."""
        ...


class Output(Protocol):
    """What is written, as far as a walk knows it."""

    @property
    def done(self) -> Mapping[str, str]:
        """The tensors that are complete, and their checksums."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor that is done."""
        ...

    def write(self, tensors: Mapping[str, Tensor], note: Mapping[str, Any] | None = None) -> None:
        """Put tensors in their places and note them as done, as `Writer.write` does."""
        ...


class Rewriting(Visitor[S]):
    """The visitor of a walk that changes linears and writes them block by block; use it as a context manager."""

    def __init__(
        self,
        change: Change[S],
        network: Network,
        writer: Output,
        transposed: Collection[str],
        ranks: Ranks = ALONE,
    ):
        self._change, self._network, self._writer, self._ranks = change, network, writer, ranks
        self._transposed = transposed  # the tensors that lie as [in, out]
        self._before = frozenset(writer.done)  # written by an earlier run
        # what nothing waits for (the report, packing, writing) is done beside the walk, in this order
        self._beside = ThreadPoolExecutor(1, "wtool-beside", initializer=torch.set_num_threads, initargs=(1,))
        self._told: dict[str, Future[Mapping[str, Any]]] = {}  # of the block being done, by tensor
        self._ready: dict[str, Callable[[], Mapping[str, Tensor]]] = {}  # of the same
        self._writing: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown(cancel_futures=True)

    def written(self, block: Block) -> Read | None:
        outputs = [name for linear in block.linears for name in self._change.outputs(linear.name)]
        return None if any(name not in self._before for name in outputs) else self._read_written

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> S | None:
        return self._change.gather(features, device) if self._changed(linears) else None

    def site(self, site: Site[S]) -> Mapping[Linear, Tensor]:
        for told in self._told.values():
            told.result()  # the report of a site holds its statistics and copies: those of one site at a time
        linears = self._changed(site.linears)
        weights = [self._network.view(linear) for linear in linears]
        made = self._change.site([linear.name for linear in linears], weights, site.gathered)
        return {linear: self._keep(linear.name, each) for linear, each in zip(linears, made, strict=True)}

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        values: dict[Linear, Tensor] = {}
        for linear in self._changed(unseen):
            made = self._change.unseen(linear.name, self._network.view(linear), "no token came to it")
            values[linear] = self._keep(linear.name, made)
        self._write_beside([linear.name for linear in block.linears])
        return values

    def finish(self, tensors: Collection[str]) -> None:
        """Change what the walk did not come to of some matrices, and wait until all is written."""
        walked = {linear.name for block in self._network.blocks for linear in block.linears}
        for name in tensors:
            if name not in walked and not all(output in self._writer.done for output in self._change.outputs(name)):
                why = "transformers does not multiply by it in a block of the model"
                self._keep(name, self._change.unseen(name, self._turned(name, self._given(name)).float(), why))
                self._write_beside([name])
        self._write_beside([])

    def _changed(self, linears: Sequence[Linear]) -> list[Linear]:
        return [linear for linear in linears if self._change.outputs(linear.name)]

    def _turned(self, name: str, stored: Tensor) -> Tensor:
        """[out, in] from how it lies, and back."""
        return stored.T if name in self._transposed else stored

    def _given(self, name: str) -> Tensor:
        """A matrix as it is before it is changed, as it lies in the checkpoint."""
        return self._network.read(name)

    def _keep(self, name: str, made: Made) -> Tensor:
        if not self._ranks.leads:
            return made.value
        self._told[name] = self._beside.submit(self._explain, name, made.explain)
        self._ready[name] = made.encode
        return made.value

    def _explain(self, name: str, explain: Callable[[Tensor], Mapping[str, Any]]) -> Mapping[str, Any]:
        stored = self._given(name)
        refuse_nonfinite(stored, f"{self._network.checkpoint.label}: tensor '{name}'")
        return explain(self._turned(name, stored))

    def _write_beside(self, names: Sequence[str]) -> None:
        """Wait for what is being written, then begin to write what was made of some matrices."""
        for writing in self._writing:
            writing.result()
        ready = [(name, self._ready.pop(name), self._told.pop(name)) for name in names if name in self._ready]
        self._writing = [self._beside.submit(self._write, *each) for each in ready]

    def _write(self, name: str, encode: Callable[[], Mapping[str, Tensor]], told: "Future[Mapping[str, Any]]") -> None:
        """Hand a matrix to the writer, but for what an earlier run wrote of it."""
        fresh = {output: tensor for output, tensor in encode().items() if output not in self._writer.done}
        digest = checksum(self._network.read(name).contiguous())
        if fresh:
            note = {"inputs": [[0, name, digest]], "report": {name.removesuffix(".weight"): told.result()}}
            self._writer.write(fresh, note=note)

    def _read_written(self, name: str) -> Tensor:
        """A tensor of a finished block as it lies in the checkpoint: the linears as they were written."""
        outputs = self._change.outputs(name)
        if not outputs:
            return self._network.read(name)
        value = self._change.decode(name, {output: self._writer.read(output) for output in outputs})
        return self._turned(name, value)
