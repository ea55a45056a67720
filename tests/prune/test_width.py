"""Which channels and heads stay, by sorting their scores in plain lists."""

from math import sqrt

import pytest
import torch

from prune.width import heads, hidden, highest, key_value_heads, norm_factor


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:keep])


@pytest.mark.parametrize("keep", [1, 2, 7, 8])
def test_the_highest_by_sorting(keep: int) -> None:
    scores = torch.randn(8, generator=torch.Generator().manual_seed(keep))
    assert list(highest(scores, keep)) == best(scores.tolist(), keep)


def test_of_equal_scores_the_first_stay() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0, 1.0, -1.0])
    kept = {1: (1,), 2: (1, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3), 5: (0, 1, 2, 3, 5), 7: (0, 1, 2, 3, 4, 5, 6)}
    assert {keep: highest(scores, keep) for keep in kept} == kept
    assert highest(torch.zeros(1000), 400) == tuple(range(400))


@pytest.mark.parametrize(("count", "kv_heads", "keep"), [(8, 2, 4), (8, 4, 4), (6, 1, 4), (6, 2, 6), (12, 3, 3)])
def test_as_many_heads_stay_of_every_key_value_head(count: int, kv_heads: int, keep: int) -> None:
    energy = torch.rand(count * 5, generator=torch.Generator().manual_seed(count + keep))
    group = count // kv_heads
    totals = [sum(energy[head * 5 + i].item() for i in range(5)) for head in range(count)]
    expected = []
    for number in range(kv_heads):
        served = totals[number * group : (number + 1) * group]
        expected += [number * group + head for head in best(served, keep // kv_heads)]
    assert list(heads(energy, count, kv_heads, keep)) == expected


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_key_value_heads_by_the_sum_over_their_query_heads(keep: int) -> None:
    energy = torch.rand(3 * 2 * 4, generator=torch.Generator().manual_seed(keep))
    totals = [sum(energy[number * 8 + i].item() for i in range(8)) for number in range(3)]
    assert list(key_value_heads(energy, 3, keep)) == best(totals, keep)


def test_every_linear_has_the_same_say_in_hidden_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    energies = [torch.rand(10, generator=generator) * 10.0**power for power in (-3, 0, 5)]
    shares = [sum(energy[i].item() / energy.sum().item() for energy in energies) for i in range(10)]
    assert list(hidden(energies, 4)) == best(shares, 4)
    assert list(hidden([*energies, torch.zeros(10)], 4)) == best(shares, 4)  # a linear that is fed zeros


def test_a_norm_s_factor_makes_the_channels_that_stay_as_long_as_they_were() -> None:
    x = torch.randn(400, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    x = x.sign() * torch.arange(1, 13).sqrt()  # the same lengths at every token, so that one factor is exact
    kept = (0, 3, 4, 11)
    spread = (x**2 / (x**2).mean(1, keepdim=True)).mean(0)
    part = x[:, kept]
    small = part / (part**2).mean(1, keepdim=True).sqrt()
    whole = x / (x**2).mean(1, keepdim=True).sqrt()
    factor = norm_factor(spread, kept)
    assert factor == pytest.approx(sqrt((1 + 4 + 5 + 12) / 4 / 6.5))
    torch.testing.assert_close(factor * small, whole[:, kept])
    assert norm_factor(spread, tuple(range(12))) == pytest.approx(1)
    assert norm_factor(torch.zeros(3), (1,)) == 0
