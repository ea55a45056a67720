"""Which row of each model stands for each token of the output, and what stands there where a model lacks the token.

A model that lacks a token gets, as in mergekit, the base's row; if the base lacks it too, the mean of the rows of the
models that have it (which is the row of the only one). A recipe may name another source for a token. Rows that no
token has (padding, in the models that have so many rows) are taken over by the same rule. A row that no model has is
the mean of the model's own rows: the output head then gives it a middling logit. Hewitt, "Initializing new word
embeddings for pretrained language models", 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wtool.checkpoint import TensorInfo
from wtool.pieces import Pieces
from wtool.plan import Told

from ..arithmetic.chunks import working_type
from .tokenizer import Tokens

Function = Callable[..., Pieces | Told]
LACKING = -1
MEAN_ROWS = 1 << 12  # rows that are summed at a time


@dataclass(frozen=True)
class Given:
    """Where the row of a token comes from, as a recipe says."""

    rows: Mapping[int, int]  # model -> row; none are a row of zeros, several a mean
    force: bool = False


@dataclass(frozen=True)
class RowMap:
    """The rows of the models in the output's order; rows is (models, size), the others as long as there are rows."""

    rows: Tensor  # int64: the row in each model; LACKING where it has none
    lacked: Tensor  # int64 (lacked,): the output's rows that some model lacks, or that all take from elsewhere
    donors: Tensor  # int64 (models, lacked): the rows whose mean stands there; LACKING in models without part in it
    forced: Tensor  # bool (lacked,): in every model
    middling: Tensor  # bool (lacked,): the mean of the model's own rows stands there

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def is_identity(self, source: int, count: int) -> bool:
        """Whether a model's tensor of so many rows is in the output's order already."""
        return (
            count == self.size
            and not bool(self.forced.any())
            and torch.equal(self.rows[source], torch.arange(self.size))
        )


def row_map(
    size: int,
    output: Tokens,
    models: Sequence[Tokens],
    counts: Sequence[int],
    base: int | None,
    given: Mapping[int, Given],
) -> RowMap:
    """Find the rows.

    size:   rows of the output
    counts: rows of each model
    base:   the model whose row stands for a token that another one lacks, if there is such a model
    given:  by the token's number in the output
    """
    rows = [_rows(size, output, tokens, count) for tokens, count in zip(models, counts, strict=True)]
    lacked = [slot for slot in range(size) if slot in given or any(own[slot] == LACKING for own in rows)]
    donors = [[LACKING] * len(lacked) for _ in models]
    middling = [False] * len(lacked)
    for place, slot in enumerate(lacked):
        have = {model: own[slot] for model, own in enumerate(rows) if own[slot] != LACKING}
        found = given[slot].rows if slot in given else ({base: have[base]} if base in have else have)
        middling[place] = not found and slot not in given
        for model, row in found.items():
            donors[model][place] = row
    return RowMap(
        torch.tensor(rows).reshape(len(models), size),
        torch.tensor(lacked, dtype=torch.int64),
        torch.tensor(donors, dtype=torch.int64).reshape(len(models), len(lacked)),
        torch.tensor([slot in given and given[slot].force for slot in lacked], dtype=torch.bool),
        torch.tensor(middling, dtype=torch.bool),
    )


def _rows(size: int, output: Tokens, own: Tokens, count: int) -> list[int]:
    """A model's row for each of the output's."""
    rows = [LACKING] * size
    for slot in range(size):
        token = output.names.get(slot)
        if token is not None:
            row = own.numbers.get(token, LACKING)
        else:
            row = slot if slot not in own.names else LACKING
        rows[slot] = row if row < count else LACKING
    return rows


def beside(rows: RowMap, sources: Sequence[int]) -> list[int]:
    """The models that are not among a step's inputs, and have rows that those lack."""
    wanted = rows.forced.clone()
    for source in sources:
        wanted |= rows.rows[source][rows.lacked] == LACKING
    return [
        source
        for source in range(rows.rows.shape[0])
        if source not in sources and bool(((rows.donors[source] != LACKING) & wanted).any())
    ]


def aligned(function: Function, rows: RowMap, axis: int, sources: Sequence[int], count: int) -> Function:
    """A function of tensors, of their rows in the output's order.

    axis:    the one that counts tokens
    sources: the model of each tensor
    count:   the first so many tensors go into the function; the others are there for rows that those lack
    """
    return partial(_aligned, function, rows, axis, tuple(sources), count)


def _aligned(
    function: Function, rows: RowMap, axis: int, sources: tuple[int, ...], count: int, *tensors: Tensor
) -> Pieces | Told:
    turned = [tensor.movedim(axis, 0) for tensor in tensors]
    common = _means(rows, sources, turned)
    inputs = [_input(rows, source, own, common) for source, own in zip(sources[:count], turned[:count], strict=True)]
    return function(*(tensor.movedim(0, axis) for tensor in inputs))


def _means(rows: RowMap, sources: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    """What stands for each lacked row: (lacked, ...), in the working type."""
    kind = working_type(tensors)
    total = torch.zeros((len(rows.lacked), *tensors[0].shape[1:]), dtype=kind)
    parts = torch.zeros(len(rows.lacked), dtype=kind)
    for source, tensor in zip(sources, tensors, strict=True):
        places = torch.nonzero(rows.donors[source] != LACKING).reshape(-1)
        found = tensor.index_select(0, rows.donors[source][places]).to(kind)
        total.index_add_(0, places, found)
        parts[places] += 1
    return total.div_(parts.clamp_min_(1).reshape(-1, *[1] * (total.dim() - 1)))


def _input(rows: RowMap, source: int, tensor: Tensor, common: Tensor) -> Tensor:
    """One model's tensor in the output's order."""
    own = rows.rows[source]
    if rows.is_identity(source, tensor.shape[0]):
        return tensor
    result = tensor.index_select(0, own.clamp_min(0))
    here = (own[rows.lacked] == LACKING) | rows.forced
    result[rows.lacked[here]] = common[here].to(tensor.dtype)
    middling = here & rows.middling
    if bool(middling.any()):
        kept = torch.ones(rows.size, dtype=torch.bool)
        kept[rows.lacked[rows.middling]] = False
        result[rows.lacked[middling]] = _mean_row(result, torch.nonzero(kept).reshape(-1)).to(tensor.dtype)
    return result


def _mean_row(tensor: Tensor, rows: Tensor) -> Tensor:
    """The mean of some rows, in the working type."""
    kind = working_type([tensor])
    total = torch.zeros(tensor.shape[1:], dtype=kind)
    for part in rows.split(MEAN_ROWS):
        total += tensor.index_select(0, part).to(kind).sum(0)
    return total / max(len(rows), 1)


def scratch(rows: RowMap, info: TensorInfo, infos: Sequence[TensorInfo], sources: Sequence[int], axis: int) -> int:
    """Bytes that the rows in the output's order take while a step runs.

    info:  of the output
    infos: of the function's inputs
    """
    across = info.elements // max(info.shape[axis], 1)
    held = sum(
        rows.size * across * (each.nbytes // max(each.elements, 1))
        for each, source in zip(infos, sources, strict=True)
        if not rows.is_identity(source, each.shape[axis])
    )
    return held + 2 * len(rows.lacked) * across * 4
