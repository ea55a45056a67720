import numpy as np
import pytest
import torch

from mergekit_lite.arithmetic import selection


@pytest.mark.parametrize("sample", [1 << 17, 1 << 9], ids=["whole", "sampled"])
@pytest.mark.parametrize("kind", ["normal", "zeros", "ties", "constant", "tiny", "one"])
def test_agrees_with_a_sort(monkeypatch, piece, kind, sample):
    monkeypatch.setattr(selection, "SAMPLE", sample)
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
    ranks = sorted({share * (numbers.size - 1) // 8 for share in range(1, 9)})
    vector = torch.from_numpy(numbers)
    found = selection.order_statistics(selection.Magnitudes([torch.zeros_like(vector), vector]), ranks)
    assert found == np.sort(numbers)[ranks].tolist()


@pytest.mark.parametrize("sample", [1 << 17, 1 << 9], ids=["whole", "sampled"])
def test_rows_have_factors(monkeypatch, piece, sample):
    monkeypatch.setattr(selection, "SAMPLE", sample)
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((70, 77)).astype(np.float32))
    factors = np.abs(np.random.default_rng(1).standard_normal(70)).astype(np.float32)
    magnitudes = selection.Magnitudes((torch.zeros(70, 77), matrix), factors)
    expected = np.abs(matrix.numpy()) * factors[:, None]
    assert selection.order_statistics(magnitudes, [7, 2000, 5000]) == np.sort(expected, None)[[7, 2000, 5000]].tolist()
    cut = selection.top(magnitudes, keep=1000)
    assert cut.magnitude == np.sort(expected, None)[-1000]
