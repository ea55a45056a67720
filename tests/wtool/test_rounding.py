"""Rounding at random against its definition: one of the two neighbours, with the chance that keeps the mean."""

import pytest
import torch

from wtool.rounding import stochastic

SHORT = (torch.bfloat16, torch.float16)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of a type below and above one that it does not have."""
    near = torch.tensor(value, dtype=torch.float64).to(dtype)
    bits = near.view(torch.int16)
    others = [(bits + step).view(dtype).double().item() for step in (-1, 0, 1)]
    return max(each for each in others if each <= value), min(each for each in others if each >= value)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("value", [1.001, -1.001, 0.0123456, -7.77, 3.1e-3, 1023.3])
def test_the_mean_is_the_number(value: float, dtype: torch.dtype) -> None:
    exact = torch.tensor(value, dtype=torch.float32).item()
    below, above = neighbours(exact, dtype)
    found = stochastic(torch.full((200_000,), value), dtype, seed=1).double()
    assert set(found.tolist()) == {below, above}
    share = (exact - below) / (above - below)
    assert (found == above).double().mean().item() == pytest.approx(share, abs=5e-3)
    assert found.mean().item() == pytest.approx(exact, abs=5e-3 * (above - below))


@pytest.mark.parametrize("dtype", SHORT)
def test_what_the_type_holds_stays(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found = stochastic(every.float(), dtype, seed=0)
    assert torch.equal(found.isnan(), every.isnan())
    assert torch.equal(found[~every.isnan()], every[~every.isnan()])


@pytest.mark.parametrize("dtype", SHORT)
def test_at_the_ends(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, -largest])
    found = stochastic(values, dtype, seed=3)
    assert str(found.tolist()) == str(values.to(dtype).tolist())
    assert stochastic(torch.full((1000,), largest * 0.9999), dtype, seed=3).isfinite().all()
    assert stochastic(torch.tensor(1e-8), torch.float16, seed=0).item() == 0  # to the nearest down there


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.int64])
def test_nothing_is_random_where_nothing_is_lost_to_16_bits(to: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 50)
    assert torch.equal(stochastic(values, to, seed=0), values.to(to))
    assert torch.equal(stochastic(values.bfloat16(), torch.float16, seed=0), values.bfloat16().half())
    assert torch.equal(stochastic(torch.arange(9), torch.bfloat16, seed=0), torch.arange(9).bfloat16())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_the_same_for_a_seed(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, dtype=dtype)
    one, same = (stochastic(values, torch.bfloat16, seed=5) for _ in range(2))
    assert one.shape == values.shape and one.dtype == torch.bfloat16 and torch.equal(one, same)


def test_a_view_of_another_order() -> None:
    values = torch.randn(6, 4)
    for found, wanted in zip(stochastic(values.mT, torch.bfloat16, seed=0).flatten(), values.mT.flatten(), strict=True):
        assert found.item() in neighbours(wanted.item(), torch.bfloat16)


def test_small_changes_survive_in_the_mean() -> None:
    """What the module is for: a change of a tenth of the distance of two numbers, to the nearest it is gone."""
    start = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).add(1).bfloat16().float()
    moved = start + 2**-7 / 10
    assert torch.equal(moved.bfloat16().float(), start)
    change = stochastic(moved, torch.bfloat16, seed=0).float() - start
    assert change.mean().item() == pytest.approx(2**-7 / 10, rel=0.03)
