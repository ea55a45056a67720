import math

import numpy as np
import pytest

from mergekit_lite.arithmetic import kernels


def divergence(new, old):
    """Of the softmax of one row from that of another, each plus 1e-8, as it is defined."""
    probabilities = []
    for row in (new, old):
        powers = [math.exp(x - max(row)) for x in row]
        probabilities.append([power / math.fsum(powers) + 1e-8 for power in powers])
    return math.fsum(p * math.log(p / q) for p, q in zip(*probabilities, strict=True))


@pytest.mark.parametrize("columns", [1, 2, 7, 255, 256, 257, 1000])
@pytest.mark.parametrize(("size", "change"), [(0.02, 0.001), (1.0, 0.3), (6.0, 1.0), (40.0, 20.0), (900.0, 900.0)])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_as_defined(columns, size, change, kind):
    random = np.random.default_rng(columns)
    base = (size * random.standard_normal((5, columns))).astype(kind)
    model = (base + change * random.standard_normal((5, columns))).astype(kind)
    model[2] = base[2]
    found = np.empty(5)
    kernels.divergences(base.reshape(-1), model.reshape(-1), columns, found, np.empty((4, columns)))
    expected = [divergence(model[row].tolist(), base[row].tolist()) for row in range(5)]
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-15)
    assert found[2] == 0.0


def test_a_tiny_probability_beside_others():
    # one that is no more than its floor, and one just above where the series is left
    old = np.zeros(300)
    old[:3] = -60.0, -12.0, 5.0
    new = old.copy()
    new[:3] = -30.0, -11.0, 5.5
    found = np.empty(1)
    kernels.divergences(old, new, 300, found, np.empty((4, 300)))
    assert found[0] == pytest.approx(divergence(new.tolist(), old.tolist()), rel=1e-12)


def test_what_is_not_a_number_is_none():
    new = np.zeros(10)
    new[3] = np.nan
    found = np.zeros(1)
    kernels.divergences(np.zeros(10), new, 10, found, np.empty((4, 10)))
    assert math.isnan(found[0])
