import pytest

from prune.pattern import Sparsity, count, dense_tail, parse_pattern
from wtool.errors import UsageError


def test_what_is_asked_is_said_in_words():
    assert str(Sparsity(0.5)) == "50 % dropped"
    assert str(Sparsity(0.333)) == "33.3 % dropped"
    assert str(parse_pattern("1:4")) == "1:4 (1 kept of every 4 neighbours)"
    assert parse_pattern(" 2 : 4 ") == Sparsity(pattern=(2, 4))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2/4", "pattern '2/4' is not N:M"),
        ("", "pattern '' is not N:M"),
        ("4:4", "pattern 4:4 is not N kept of every M, with N from 1 to M - 1"),
        ("4:2", "pattern 4:2 is not N kept of every M"),
        ("0:4", "pattern 0:4 is not N kept of every M"),
    ],
)
def test_patterns_that_are_none(text, told):
    with pytest.raises(UsageError, match=told):
        parse_pattern(text)


@pytest.mark.parametrize("share", [1.0, -0.1, 50, float("nan"), float("inf")])
def test_shares_that_are_none(share):
    with pytest.raises(UsageError, match="is not a share of the weights to drop, from 0 to below 1"):
        Sparsity(share)


def test_one_of_the_two():
    for asked in ((None, None), (0.5, (2, 4))):
        with pytest.raises(UsageError, match="one of the two"):
            Sparsity(*asked)


@pytest.mark.parametrize("percent", range(100))
def test_counts_are_exact_where_binary_fractions_are_not(percent):
    assert count(percent / 100, 100) == percent
    assert count(percent / 100, 10**12) == percent * 10**10
    assert count(percent / 100, 576) == percent * 576 // 100


def test_how_many_weights_are_dropped():
    assert Sparsity(0.7).dropped(3, 5, by_row=True) == 9
    assert Sparsity(0.7).dropped(3, 5, by_row=False) == 10
    assert Sparsity(0.0).dropped(3, 5, by_row=True) == 0
    for by_row in (True, False):
        assert Sparsity(pattern=(1, 4)).dropped(3, 10, by_row=by_row) == 3 * 2 * 3
    assert Sparsity(pattern=(1, 4)).nominal == 0.75 and Sparsity(0.3).nominal == 0.3


def test_columns_that_no_group_covers():
    assert [dense_tail(columns, Sparsity(pattern=(2, 4))) for columns in (1, 4, 10, 576)] == [1, 0, 2, 0]
    assert dense_tail(10, Sparsity(0.5)) == 0
