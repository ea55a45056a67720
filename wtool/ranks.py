"""Several processes for one model, as torchrun starts them: each takes some of the batches, sums are those of all.

All make the same plan, go through the same blocks in the same order, and meet where something is added up or handed
around. The first process writes and speaks. One that fails tells the others why in the store that torchrun keeps, and
ends: whoever waits for it is let go at once, and says nothing more.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from wtool.errors import RuntimeProblem, UsageError, WtoolError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = 3.0  # seconds to wait for what another process has to tell of its end
T = TypeVar("T")
P = ParamSpec("P")


class _Parted(Exception):
    """Another process is gone."""


@dataclass(frozen=True)
class Ranks:
    """The processes of this run, and which this one is; all must call what is said to be of all."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def own(self, items: Sequence[T]) -> list[T]:
        """The share of this process."""
        return list(items[self.rank :: self.size])

    def add_up(self, sums: "Sequence[Tensor]") -> None:
        """Make tensors, in place, the sums of those of all processes; the order of a sum is the backend's."""
        if self.size > 1:
            import torch.distributed as dist

            with _together():
                for part in sums:
                    dist.all_reduce(part)

    def from_first(self, value: "T | None") -> "T":
        """What the first of all processes gives; it must be picklable."""
        box = [value]
        if self.size > 1:
            import torch.distributed as dist

            with _together():
                dist.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def of_all(self, value: T) -> list[T]:
        """What all processes give, in their order; it must be picklable."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        box: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(box, value)
        return box

    def tensors_of_all(self, tensors: "Sequence[Tensor]", device: "torch.device") -> "list[list[Tensor]]":
        """The tensors of all processes, in their order; they may be of any number, shapes and types."""
        found: list[list[Tensor]] = []
        for source, layout in enumerate(self.of_all([(tensor.shape, tensor.dtype) for tensor in tensors])):
            given = tensors if source == self.rank else [None] * len(layout)
            each = zip(given, layout, strict=True)
            found.append([self._copied(source, tensor, *what, device) for tensor, what in each])
        return found

    def copy_of_first(self, tensor: "Tensor | None", shape: Sequence[int], dtype: "torch.dtype") -> "Tensor":
        """A tensor in the memory of the first of all processes; the others give None."""
        import torch

        return self._copied(0, tensor, (torch.Size(shape)), dtype, torch.device("cpu"))

    def _copied(
        self, source: int, tensor: "Tensor | None", shape: "torch.Size", dtype: "torch.dtype", device: "torch.device"
    ) -> "Tensor":
        import torch

        value = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.contiguous()
        if self.size > 1 and value.numel():
            import torch.distributed as dist

            with _together():  # bytes, as no backend knows all types
                dist.broadcast(value.reshape(-1).view(torch.uint8), src=source)
        return value


ALONE = Ranks(0, 1)


def current() -> Ranks:
    """The processes that were brought together in this one."""
    if "torch.distributed" not in sys.modules:
        return ALONE
    import torch.distributed as dist

    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else ALONE


def one_process(what: str) -> None:
    """Refuse to do in several processes what they would only do one beside the other.

    raises: UsageError
    """
    if current().size > 1:
        raise UsageError(f"{what} is done by one process: start it without torchrun")


def own_device(device: str) -> str:
    """The GPU of this process, where any would do."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and current().size > 1 else device


def together(command: Callable[P, None]) -> Callable[P, None]:
    """A command that, started by torchrun, is carried out by all processes together; only the first one speaks."""

    @wraps(command)
    def carried_out(*args: P.args, **kwargs: P.kwargs) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return command(*args, **kwargs)
        with _joined() as ranks, _quiet(not ranks.leads):
            return command(*args, **kwargs)

    return carried_out


@contextmanager
def _together() -> Iterator[None]:
    """Tell the end of another process from a fault of this one."""
    try:
        yield
    except RuntimeError as error:
        raise _Parted(str(error)) from None


@contextmanager
def _quiet(asked: bool) -> Iterator[None]:
    if not asked:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def _joined() -> Iterator[Ranks]:
    """All processes that torchrun started, for a while; errors are told by one of them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # how a process leaves is told by us, in one line
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size)
    told = PrefixStore("failed", store)
    try:
        yield Ranks(rank, size)
    except _Parted as error:
        line = _of_others(told, rank, size)
        if line is None and rank == 0:
            raise RuntimeProblem(
                f"another process of this run is gone ({error}); what is done is kept, start the same command again"
            ) from None
        raise SystemExit(RuntimeProblem.exit_code) from None
    except WtoolError as error:
        if rank and _first_says(told, rank, str(error)):
            raise SystemExit(error.exit_code) from None
        told.set(str(rank), str(error))
        raise type(error)(f"process {rank}: {error}" if rank else str(error)) from None
    except Exception as error:
        told.set(str(rank), repr(error))
        raise
    finally:
        dist.destroy_process_group()


def _first_says(told: Any, rank: int, line: str) -> bool:
    """Whether the first process tells the same error; where it is gone already, with the store, it has spoken."""
    try:
        told.set(str(rank), line)
    except RuntimeError:
        return True
    said = _of_others(told, rank, 1)
    if said is not None:
        return said == line
    try:
        told.check([str(rank)])
    except RuntimeError:
        return True
    return False


def _of_others(told: Any, rank: int, size: int) -> str | None:
    """What another process tells of its end, before patience ends; None where all are silent."""
    end = time.monotonic() + PATIENCE
    with suppress(RuntimeError):  # where the store itself is gone
        while time.monotonic() < end:
            for other in range(size):
                if other != rank and told.check([str(other)]):
                    return told.get(str(other)).decode()
            time.sleep(0.05)
    return None
