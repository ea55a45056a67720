"""The walk that gathers statistics and writes them to a folder, to go on where it was after a stop."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wtool.block_pass import Visitor
from wtool.calibrate import Progress, Site, Where, network, walk, working_dtype
from wtool.calibration_data import Windows
from wtool.checkpoint import Checkpoint
from wtool.network import Block, Linear, Network, Read
from wtool.output_gradients import squared_gradients
from wtool.statistics import Gram
from wtool.statistics_folder import Input, StatisticsWriter, identity
from wtool.writer import is_complete

GRADIENT_TOKENS = 4096  # at most, of the first windows


@dataclass(frozen=True)
class Gathered:
    """What was done."""

    already_there: bool
    blocks: int


def gather(
    checkpoint: Checkpoint,
    windows: Windows,
    out: Path,
    *,
    where: Where,
    gradients: bool = False,
    lifted: bool = False,
    force: bool = False,
    start: Callable[[int], Progress] = lambda steps: lambda done: None,
) -> Gathered:
    """Gather the statistics of a model on windows of text, or go on with what was stopped.

    gradients: mean squared gradients by the outputs too
    lifted: Gram matrices are of lifted tokens (`wtool.statistics.lifts`)
    start: is told how many steps there are and gives the function that is told of each; called for each of the walks

    raises: InputError, OutputError
    """
    about = {
        "model": checkpoint.label,
        "model_files": identity(checkpoint),
        "calibration": windows.record,
        "computed_in": where.dtype or working_dtype(checkpoint, where.device),
        **({"gradients": True} if gradients else {}),
        **({"lifted": True} if lifted else {}),
    }
    fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    if out.exists() and not force and is_complete(out, fingerprint):
        return Gathered(True, 0)
    model = network(checkpoint, where)
    with StatisticsWriter(out, fingerprint, force=force) as writer:
        walk(model, windows.unpadded(), _Saving(writer, model, lifted=lifted), way="observe", where=where, start=start)
        if gradients and not writer.has_gradients:
            few = first_tokens(windows.unpadded(), GRADIENT_TOKENS)
            writer.put_gradients(squared_gradients(model, few, where=where, start=start))
        writer.commit(len(model.blocks), about)
    return Gathered(False, len(model.blocks))


def first_tokens(windows: Sequence[Tensor], most: int) -> list[Tensor]:
    """The first windows, of `most` tokens together, and one at least."""
    found, tokens = list(windows[:1]), len(windows[0])
    for window in windows[1:]:
        tokens += len(window)
        if tokens > most:
            break
        found.append(window)
    return found


class _Saving(Visitor[Gram]):
    """The visitor that writes what it is shown, and changes nothing."""

    def __init__(self, writer: StatisticsWriter, network: Network, *, lifted: bool):
        self._writer, self._network, self._lifted = writer, network, lifted
        self._grams: dict[Input, Tensor] = {}

    def written(self, block: Block) -> Read | None:
        return self._network.read if self._writer.has(block.index) else None

    def gather(self, linears: tuple[Linear, ...], features: int, device: torch.device) -> Gram:
        return Gram(features, device, lifted=self._lifted)

    def site(self, site: Site[Gram]) -> Mapping[Linear, Tensor]:
        names = tuple(linear.name for linear in site.linears)
        self._grams[Input(names, site.gathered.tokens, site.gathered.dropped)] = site.gathered.finish()
        return {}

    def block(self, block: Block, unseen: Sequence[Linear]) -> Mapping[Linear, Tensor]:
        self._writer.put(block.index, self._grams)
        self._grams = {}
        return {}
