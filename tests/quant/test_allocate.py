"""The choice of candidates against all choices there are, tried one after the other."""

from itertools import product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.allocate import Allocation, allocate, smallest

Instance = tuple[list[list[int]], list[list[float]], list[list[int]]]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to five matrices of up to four candidates, some of which some cannot take, in groups."""
    matrices, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size, loss = st.integers(0, 10**9), st.floats(0, 1e3, allow_subnormal=False) | st.integers(0, 3).map(float)
    sizes = [[draw(size) for _ in range(candidates)] for _ in range(matrices)]
    losses = [[draw(loss) for _ in range(candidates)] for _ in range(matrices)]
    spoiled = draw(st.sets(st.tuples(st.integers(0, matrices - 1), st.integers(1, candidates)), max_size=2))
    for i, j in spoiled:
        if j < candidates:  # candidate 0 is one that all can take
            losses[i][j] = inf
    group_of = [draw(st.integers(0, matrices - 1)) for _ in range(matrices)]
    groups = [[i for i in range(matrices) if group_of[i] == g] for g in sorted(set(group_of))]
    return sizes, losses, groups


def all_choices(instance: Instance) -> list[tuple[int, float]]:
    """Size and loss of every choice that can be."""
    sizes, losses, groups = instance
    found = []
    for picks in product(range(len(sizes[0])), repeat=len(groups)):
        pairs = [(i, pick) for group, pick in zip(groups, picks, strict=True) for i in group]
        loss = sum(losses[i][j] for i, j in pairs)
        if loss < inf:
            found.append((sum(sizes[i][j] for i, j in pairs), loss))
    return found


def check(instance: Instance, budget: int, made: Allocation) -> None:
    sizes, losses, groups = instance
    assert made.size == sum(sizes[i][j] for i, j in enumerate(made.choices)) <= budget
    assert made.loss == pytest.approx(sum(losses[i][j] for i, j in enumerate(made.choices)))
    assert all(len({made.choices[i] for i in group}) == 1 for group in groups)


@settings(max_examples=150, deadline=None)
@given(instances(), st.floats(0, 1))
def test_no_choice_within_the_budget_is_better(instance: Instance, share: float) -> None:
    choices = all_choices(instance)
    least, most = min(size for size, _ in choices), max(size for size, _ in choices)
    assert smallest(*instance) == least
    budget = least + int((most - least) * share)
    made = allocate(*instance, budget)
    check(instance, budget, made)
    best = min(loss for size, loss in choices if size <= budget)
    assert made.loss == pytest.approx(best, rel=1.1e-4, abs=1e-6)
    assert made.bound <= best * (1 + 1e-9) + 1e-9
    assert 0 <= made.gap <= 1.1e-4 or made.loss < 1e-3


@settings(max_examples=50, deadline=None)
@given(instances(), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_a_larger_budget_is_never_worse(instance: Instance, shares: list[float]) -> None:
    sizes = [size for size, _ in all_choices(instance)]
    budgets = [min(sizes) + int((max(sizes) - min(sizes)) * share) for share in sorted(shares)]
    losses = [allocate(*instance, budget).loss for budget in budgets]
    assert all(after <= before * (1 + 1.1e-4) + 1e-6 for before, after in zip(losses, losses[1:], strict=False))


def test_every_byte_of_the_budget_counts() -> None:
    """One byte too few for the better candidate, at sizes where a tolerance could hide it."""
    size = 10**11
    sizes, losses = [[size, size + 10**9]], [[1.0, 0.0]]
    assert allocate(sizes, losses, [[0]], size + 10**9).choices == (1,)
    assert allocate(sizes, losses, [[0]], size + 10**9 - 1).choices == (0,)


def test_many_matrices_are_allocated_to_a_proven_gap() -> None:
    """As many as a mixture of experts has, losses falling fourfold a bit."""
    count, bits = 600, (2, 3, 4, 5, 6, 8)
    sizes = [[(1000 + 7 * (i % 13)) * b for b in bits] for i in range(count)]
    losses = [[(1 + i * 37 % 101) * 4.0**-b for b in bits] for i in range(count)]
    groups = [[i] for i in range(count)]
    budget = sum(row[1] + row[2] for row in sizes) // 2  # 3.5 bits
    made = allocate(sizes, losses, groups, budget)
    assert made.gap <= 1e-4
    assert budget - 10_000 < made.size <= budget
    for i in range(count - 1):  # of matrices of one size, the more sensitive has no fewer bits
        for other in range(i + 13, count, 13 * 29):
            if losses[i][0] > losses[other][0] * 4.01:
                assert made.choices[i] >= made.choices[other]


def test_a_budget_beyond_all_needs_takes_the_best_of_each() -> None:
    made = allocate([[3, 2, 1], [1, 2, 3]], [[0.5, 0.25, 0.25], [1.0, 0.5, 0.5]], [[0], [1]], 10**6)
    assert made.choices == (2, 1)  # the smaller of two that are as good
    assert made.gap == 0
