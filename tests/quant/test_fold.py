import pytest
import torch

from quant.fold import Scaling, divided_norm, with_columns, with_rows


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_and_its_scales_give_what_the_norm_gave(dtype, offset):
    weight = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    scales = torch.rand(200, generator=torch.Generator().manual_seed(1)) * 8 + 0.1
    changed, own = divided_norm(weight, scales, dtype, offset=offset)
    assert changed.dtype == dtype and bool((own > 0).all())
    torch.testing.assert_close((changed.float() + offset) * own, weight.float() + offset, rtol=1e-6, atol=1e-6)
    if dtype == torch.float32:
        torch.testing.assert_close(own, scales, rtol=1e-3, atol=0)


def test_channels_of_nothing_stay():
    """A norm that multiplies by 0, and one whose divided weight is 0 in its type."""
    weight = torch.tensor([0.0, 6e-8, 2.0], dtype=torch.float16)
    changed, own = divided_norm(weight, torch.tensor([4.0, 1e6, 4.0]), torch.float16, offset=0)
    assert changed.tolist() == [0.0, weight[1].item(), 0.5] and own.tolist() == [1.0, 1.0, 4.0]
    gemma = torch.tensor([-1.0, 0.0])
    changed, own = divided_norm(gemma, torch.tensor([2.0, 2.0]), torch.float32, offset=1)
    assert changed.tolist() == [-1.0, -0.5] and own.tolist() == [1.0, 2.0]


def test_rows_and_columns_by_loops():
    matrix, bias = torch.randn(6, 4), torch.randn(6)
    columns, rows = torch.rand(4) + 0.5, torch.rand(2) + 0.5
    scaling = with_columns(with_rows(Scaling(), 3, rows, 6), columns)
    found, moved = scaling.of(matrix), scaling.of_bias(bias)
    for r in range(6):
        divisor = rows[r - 3] if r in (3, 4) else 1.0
        assert float(moved[r]) == pytest.approx(float(bias[r] / divisor), rel=1e-6)
        for c in range(4):
            assert float(found[r, c]) == pytest.approx(float(matrix[r, c] * columns[c] / divisor), rel=1e-6)
