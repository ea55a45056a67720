"""How windows come about: order, choice and shares by their definitions."""

import random
from itertools import pairwise, product

import pytest

from wtool.calibration_data.packing import chosen, order, shares


def test_the_order_is_the_same_on_every_machine() -> None:
    assert order(10, random.Random("0 source 0")) == [5, 3, 9, 8, 4, 1, 7, 6, 0, 2]
    assert chosen(1000, 5, random.Random("0 windows")) == [132, 264, 597, 688, 809]


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_an_order_is_a_permutation_by_keys_drawn_in_turn(count: int) -> None:
    keys = random.Random(7)
    drawn = sorted((keys.random(), number) for number in range(count))
    assert order(count, random.Random(7)) == [number for _, number in drawn]


@pytest.mark.parametrize("count, wanted", [(10, 3), (7, 6), (100, 1), (1000, 999)])
def test_the_choice_is_one_of_each_range(count: int, wanted: int) -> None:
    seen: set[int] = set()
    for seed in range(200):
        found = chosen(count, wanted, random.Random(seed))
        assert len(found) == wanted and all(a < b for a, b in pairwise(found))
        for place, number in enumerate(found):
            assert place * count // wanted <= number < (place + 1) * count // wanted
        seen.update(found)
    assert len(seen) > 0.8 * count  # none is out of reach


@pytest.mark.parametrize("count, wanted", [(0, 1), (1, 1), (3, 3), (3, 10)])
def test_few_are_all_chosen(count: int, wanted: int) -> None:
    assert chosen(count, wanted, random.Random(0)) == list(range(count))


def test_shares_are_as_even_as_they_can_be() -> None:
    for wanted, a, b, c in product(range(12), range(6), range(6), range(6)):
        available = [a, b, c]
        given = shares(wanted, available, [1, 1, 1])
        assert sum(given) == min(wanted, sum(available))
        assert all(0 <= mine <= most for mine, most in zip(given, available, strict=True))
        unsated = [mine for mine, most in zip(given, available, strict=True) if mine < most]
        assert all(max(given) - mine <= 1 for mine in unsated)  # who got less than another had no more


def test_shares_by_weight() -> None:
    assert shares(12, [100, 100], [1, 3]) == [3, 9]
    assert shares(12, [100, 5], [1, 3]) == [7, 5]
    assert shares(5, [], []) == []
