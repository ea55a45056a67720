"""Products of float32 matrices rounded to bfloat16: exact of what is bfloat16 already, and only while asked for."""

import pytest
import torch
from tiny_models import llama, saved
from torch import Tensor

from wtool.calibrate import working_dtype
from wtool.checkpoint import open_checkpoint
from wtool.products import in_bfloat16


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(128, 128, generator=generator) for _ in range(2))
    return left.to(dtype).float(), right.to(dtype).float()


def error(left: Tensor, right: Tensor) -> float:
    wanted = left.double() @ right.double()
    return float((left @ right - wanted).norm() / wanted.norm())


def test_of_bfloat16_numbers_they_are_exact_to_the_sums() -> None:
    with in_bfloat16():
        assert error(*pair(torch.bfloat16)) < 1e-6


def test_of_others_they_are_near_and_afterwards_as_before() -> None:
    before = error(*pair(torch.float32))
    with in_bfloat16():
        assert error(*pair(torch.float32)) < 2**-8
    assert error(*pair(torch.float32)) == before < 1e-6


def test_an_error_does_not_leave_them_on() -> None:
    with pytest.raises(KeyError), in_bfloat16():
        raise KeyError
    assert error(*pair(torch.float32)) < 1e-6


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_a_bfloat16_model_is_walked_in_bfloat16(
    dtype: torch.dtype, tiles: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model is computed in the same type wherever that is not its own."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    checkpoint = open_checkpoint(str(saved(llama().to(dtype), tmp_path_factory.mktemp("model"))))
    short = tiles and dtype == torch.bfloat16
    assert working_dtype(checkpoint, "cpu") == ("BF16" if short else "F32")
