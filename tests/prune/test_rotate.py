"""The arithmetic of a rotation, by its definition in float64, and what the principal directions are."""

import pytest
import torch
from torch import Tensor

from prune import rotate
from prune.rotate import principal_directions, turned, unit


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
    monkeypatch.setattr(rotate, "PIECE", piece)
    weight, directions, gain = random(7, 5).to(dtype), orthogonal(5), random(5, seed=1).to(dtype)
    expected = by_definition(weight.double().tolist(), directions.tolist(), gain.double().tolist())
    found = turned(weight, directions, axis=1, gain=gain)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).to(dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (5,)])
def test_what_writes_to_the_stream_is_multiplied_from_the_other_side(shape: tuple[int, ...]) -> None:
    weight, directions = random(*shape), orthogonal(5)
    columns = weight.reshape(5, -1).T.double().tolist()
    expected = torch.tensor(by_definition(columns, directions.tolist(), [1.0] * 5)).T.reshape(shape)
    found = turned(weight, directions, axis=0)
    torch.testing.assert_close(found, expected.float())
    assert found.is_contiguous()


def test_turning_there_and_back_changes_nothing_and_neither_is_the_input_changed() -> None:
    weight, directions = random(6, 5), orthogonal(5)
    before = weight.clone()
    torch.testing.assert_close(turned(turned(weight, directions, axis=1), directions.T, axis=1), weight)
    assert torch.equal(weight, before)


def test_one_channel() -> None:
    assert turned(torch.tensor([[3.0], [2.0]]), principal_directions(torch.ones(1, 1)).abs(), axis=1).tolist() == [
        [3.0],
        [2.0],
    ]


def test_principal_directions_are_orthonormal_and_the_first_hold_the_most() -> None:
    tokens = random(200, 6).double() @ torch.diag(torch.tensor([0.1, 3, 1, 0, 2, 0.5]).double()) @ orthogonal(6)
    moment = tokens.T @ tokens / 200
    directions = principal_directions(moment)
    assert directions.dtype == torch.float64
    torch.testing.assert_close(directions.T @ directions, torch.eye(6).double())
    energies = directions.T @ moment @ directions
    torch.testing.assert_close(energies, torch.diag(energies.diagonal()), rtol=0, atol=1e-12)
    assert energies.diagonal().tolist() == sorted(energies.diagonal().tolist(), reverse=True)
    assert float(energies[5, 5]) == pytest.approx(0, abs=1e-12)  # one direction is never used
    for seed in range(20):  # no other three directions hold more of the tokens
        others = torch.linalg.qr(random(6, 3, seed=seed).double()).Q
        assert float((tokens @ others).square().sum()) <= float((tokens @ directions[:, :3]).square().sum())


def test_directions_of_nothing_are_directions_all_the_same() -> None:
    directions = principal_directions(torch.zeros(4, 4))
    torch.testing.assert_close(directions.T @ directions, torch.eye(4).double())


def test_unit_tokens_have_a_mean_square_of_one_however_long_they_were() -> None:
    tokens = torch.stack([random(8), 1e4 * random(8, seed=1), 1e-4 * random(8, seed=2)])[None]
    scaled = unit(tokens.to(torch.bfloat16))
    assert scaled.dtype == torch.float32
    for row, before in zip(scaled[0].double(), tokens[0].to(torch.bfloat16).double(), strict=True):
        assert float((row * row).mean()) == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(row / row.norm(), before / before.norm(), rtol=1e-5, atol=1e-6)
    assert not unit(torch.zeros(2, 8)).any()
