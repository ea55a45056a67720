"""The arithmetic of a rotation, by its definition in float64."""

import pytest
import torch
from torch import Tensor

from wtool import rotation
from wtool.rotation import Dense, turned


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(random(size, size).double()).Q


def by_definition(weight: list[list[float]], directions: list[list[float]], gain: list[float]) -> list[list[float]]:
    """W diag(g) Q, with loops."""
    size = range(len(gain))
    return [[sum(row[i] * gain[i] * directions[i][j] for i in size) for j in size] for row in weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 10, 1 << 22])
def test_what_reads_the_stream_is_multiplied_by_the_norm_and_the_directions_and_rounded_once(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "PIECE", piece)
    weight, directions, gain = random(7, 5).to(dtype), orthogonal(5), random(5, seed=1).to(dtype)
    expected = by_definition(weight.double().tolist(), directions.tolist(), gain.double().tolist())
    found = turned(weight, Dense(directions), axis=1, gain=gain)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).to(dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (5,)])
def test_what_writes_to_the_stream_is_multiplied_from_the_other_side(shape: tuple[int, ...]) -> None:
    weight, directions = random(*shape), orthogonal(5)
    columns = weight.reshape(5, -1).T.double().tolist()
    expected = torch.tensor(by_definition(columns, directions.tolist(), [1.0] * 5)).T.reshape(shape)
    found = turned(weight, Dense(directions), axis=0)
    torch.testing.assert_close(found, expected.float())
    assert found.is_contiguous()


def test_turning_there_and_back_changes_nothing_and_neither_is_the_input_changed() -> None:
    weight, directions = random(6, 5), orthogonal(5)
    before = weight.clone()
    torch.testing.assert_close(turned(turned(weight, Dense(directions), axis=1), Dense(directions.T), axis=1), weight)
    assert torch.equal(weight, before)


def test_one_channel() -> None:
    weight = torch.tensor([[3.0], [2.0]])
    assert turned(weight, Dense(-torch.ones(1, 1).double()), axis=1).tolist() == [[-3.0], [-2.0]]


def test_channels_in_the_middle_and_a_wider_type_for_what_is_turned_again() -> None:
    weight, directions = random(2, 5, 3).to(torch.bfloat16), orthogonal(5)
    found = turned(weight, Dense(directions), axis=1, dtype=torch.float32)
    expected = torch.stack([directions.T @ part.double() for part in weight])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_digest_tells_matrices_apart() -> None:
    directions = orthogonal(5)
    assert Dense(directions).digest == Dense(directions.clone()).digest != Dense(directions.T).digest
