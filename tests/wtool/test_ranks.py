"""What several processes share: every item once, sums, and tensors of all types and shapes to the bit."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

from wtool.errors import UsageError
from wtool.ranks import ALONE, Ranks, current, one_process, own_device, together

SIZE = 3


def tensors(rank: int) -> list[torch.Tensor]:
    """Another number of other shapes and types in every process."""
    torch.manual_seed(rank)
    made = [
        torch.randn(3 + rank, 5).bfloat16(),
        torch.randint(-8, 8, (2, rank)).to(torch.int8),  # none in the first process
        torch.tensor(rank, dtype=torch.int64),
        torch.rand(4, 6).T > 0.5,  # as it does not lie in memory
    ]
    return made[: 4 - rank]


def _share(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    @together
    def command(start: int) -> None:
        ranks = current()
        assert ranks == Ranks(rank, SIZE)
        with pytest.raises(UsageError, match="^merging is done by one process: start it without torchrun$"):
            one_process("merging")
        assert own_device("cuda") == "cuda:0" and own_device("cpu") == "cpu"
        sums = [torch.full((3,), float(rank + start)), torch.tensor([rank, 1])]
        ranks.add_up(sums)
        whole = torch.arange(6.0).view(2, 3).bfloat16()
        torch.save(
            {
                "sums": sums,
                "of_all": ranks.of_all({"rank": rank}),
                "from_first": ranks.from_first("said" if ranks.leads else None),
                "tensors": ranks.tensors_of_all(tensors(rank), torch.device("cpu")),
                "first": ranks.copy_of_first(whole if ranks.leads else None, (2, 3), torch.bfloat16),
            },
            folder / f"{rank}.pt",
        )
        print("spoken", file=(folder / "spoken").open("a")) if ranks.leads else print("not to be seen")

    command(1)


def test_all_processes_have_what_each_gave(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pytest"])
    processes = [context.Process(target=_share, args=(rank, port, tmp_path)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(SIZE):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(got["sums"][0], torch.full((3,), 6.0))
        assert torch.equal(got["sums"][1], torch.tensor([3, 3]))
        assert got["of_all"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert got["from_first"] == "said"
        assert torch.equal(got["first"], torch.arange(6.0).view(2, 3).bfloat16())
        for source in range(SIZE):
            expected = tensors(source)
            assert len(got["tensors"][source]) == len(expected)
            for ours, theirs in zip(got["tensors"][source], expected, strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_item_is_some_process_s_own(count: int) -> None:
    items = list(range(count))
    shares = [Ranks(rank, SIZE).own(items) for rank in range(SIZE)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_is_as_it_was() -> None:
    assert current() == ALONE and ALONE.leads
    one_process("anything")
    assert own_device("cuda") == "cuda"
    kept = torch.ones(2)
    ALONE.add_up([kept])
    assert torch.equal(kept, torch.ones(2))
    assert ALONE.of_all("x") == ["x"] and ALONE.from_first("x") == "x"
    assert torch.equal(ALONE.tensors_of_all([kept], kept.device)[0][0], kept)


def test_a_command_keeps_its_name_and_options() -> None:
    @together
    def command(model: str, bits: int = 4) -> None:
        raise UsageError(f"{model} {bits}")

    assert command.__name__ == "command"
    with pytest.raises(UsageError, match="^m 3$"):
        command("m", bits=3)
