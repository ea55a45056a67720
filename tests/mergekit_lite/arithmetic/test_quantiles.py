import numpy as np
import pytest

from mergekit_lite.arithmetic.quantiles import order_statistics


@pytest.mark.parametrize("kind", ["normal", "zeros", "ties", "constant", "tiny", "one"])
def test_agrees_with_a_sort(kind):
    numbers = np.abs(np.random.default_rng(0).standard_normal(5000)).astype(np.float32)
    if kind == "zeros":
        numbers[::2] = 0.0
    if kind == "ties":
        numbers = np.round(numbers, 1)
    if kind == "constant":
        numbers[:] = 0.3
    if kind == "tiny":
        numbers *= np.float32(1e-38)  # partly below the normal floats
    if kind == "one":
        numbers = numbers[:1]
    ranks = sorted({share * (numbers.size - 1) // 8 for share in range(9)})
    found = order_statistics(lambda: np.array_split(numbers, 7), ranks)
    assert found == np.sort(numbers)[ranks].tolist()
