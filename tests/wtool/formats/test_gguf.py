"""GGUF's types: what we encode, the gguf package decodes to what was meant, nearer than plain rounding does."""

import itertools

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from wtool.formats import gguf as ours
from wtool.formats.gguf import TYPES, encode
from wtool.formats.gguf_search import affine, symmetric
from wtool.formats.gguf_super import Kind, fit

SUPER = [name for name in TYPES if name.endswith("_K")]
LEGACY = [name for name in TYPES if not name.endswith("_K")]
# What |w - decoded| / |w| is for normal weights, at most: from the step that so many levels over the range make
LEVELS = {"Q2_K": 4, "Q3_K": 8, "Q4_0": 16, "Q4_1": 16, "Q4_K": 16, "Q5_0": 32, "Q5_1": 32, "Q5_K": 32, "Q6_K": 64}


def decoded(packed: Tensor, name: str) -> Tensor:
    return torch.from_numpy(gguf.dequantize(packed.numpy(), GGMLQuantizationType[name]))


def weights(rows: int = 3, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def error(weight: Tensor, name: str, importance: Tensor | None = None, count: Tensor | None = None) -> float:
    missed = (decoded(encode(weight, name, importance), name) - weight.float()).square()
    return float((missed if count is None else missed * count).sum())


@pytest.mark.parametrize("name", TYPES)
def test_the_table_is_that_of_the_gguf_package(name: str) -> None:
    kind, row = GGMLQuantizationType[name], TYPES[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (row.values, row.nbytes) and kind.value == row.number
    assert encode(weights(), name).shape == (3, row.row_bytes(512))


@pytest.mark.parametrize("name", LEGACY)
def test_no_worse_than_the_gguf_package(name: str) -> None:
    weight, kind = weights(8), GGMLQuantizationType[name]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    assert error(weight, name) <= 1.001 * float((theirs - weight).square().sum())


@pytest.mark.parametrize("name", LEVELS)
def test_nearer_than_rounding_over_the_whole_range(name: str) -> None:
    """The error of a group rounded to as many levels between its extremes is that of a uniform step."""
    weight = weights(8)
    group = 32 if name in LEGACY or name in ("Q4_K", "Q5_K") else 16
    groups = weight.view(-1, group)
    ends = torch.stack([groups.abs().amax(1) * sign for sign in (-1, 1)]) if name[-1] == "0" else None
    least, most = ends if ends is not None else (groups.amin(1), groups.amax(1))
    if name in ("Q3_K", "Q6_K"):
        most = groups.abs().amax(1)
        least = -most
    step = ((most - least) / (LEVELS[name] - 1))[:, None]
    rounded = ((groups - least[:, None]) / step).round() * step + least[:, None]
    assert error(weight, name) < 1.05 * float((rounded - groups).square().sum())


@pytest.mark.parametrize("name", SUPER)
def test_bits_lie_where_the_package_reads_them(name: str) -> None:
    """The package decodes exactly what was encoded: each code, scale and minimum is in its place."""
    kinds = {
        "Q2_K": Kind(16, 0, 3, 0, 15, minima=True),
        "Q3_K": Kind(16, -4, 3, -32, 31, minima=False),
        "Q4_K": Kind(32, 0, 15, 0, 63, minima=True),
        "Q5_K": Kind(32, 0, 31, 0, 63, minima=True),
        "Q6_K": Kind(16, -32, 31, -128, 127, minima=False),
    }
    weight = weights(4, 256) * torch.linspace(0.1, 3, 256)  # so that groups have scales of every size
    made = fit(weight, torch.ones_like(weight), kinds[name])
    assert len(made.scales.unique()) > 4 and len(made.codes.unique()) == kinds[name].high - kinds[name].low + 1
    torch.testing.assert_close(decoded(encode(weight, name), name), made.values(), rtol=1e-6, atol=1e-8)


def test_q4_k_by_its_definition() -> None:
    """A super-block read byte by byte: two halves, twelve bytes of six-bit scales and minima, 128 bytes of codes."""
    weight = weights(1, 256) * torch.linspace(0.1, 3, 256)
    raw = encode(weight, "Q4_K")[0].numpy().tobytes()
    d, e = np.frombuffer(raw[:4], np.float16).astype(np.float64)
    six, codes = raw[4:16], raw[16:]
    found: list[float] = []
    for group in range(8):
        if group < 4:
            scale, minimum = six[group] & 63, six[group + 4] & 63
        else:
            scale = (six[group + 4] & 15) | (six[group - 4] >> 6 << 4)
            minimum = (six[group + 4] >> 4) | (six[group] >> 6 << 4)
        for i in range(32):
            byte = codes[group // 2 * 32 + i]
            code = byte >> 4 if group % 2 else byte & 15
            found.append(d * scale * code - e * minimum)
    read = decoded(encode(weight, "Q4_K"), "Q4_K")[0]
    np.testing.assert_allclose(found, read, rtol=1e-5, atol=1e-7)
    assert float((torch.tensor(found) - weight[0]).norm() / weight.norm()) < 0.09


def test_the_scale_of_a_group_by_brute_force() -> None:
    groups = weights(20, 8)
    scale = symmetric(groups, torch.ones(8), -4, 3)
    found = (groups - scale * (groups / scale).round().clamp(-4, 3)).square().sum(1)
    peak = groups.abs().amax(1, keepdim=True)
    best = torch.full((20,), torch.inf)
    for share in np.linspace(-0.6, 0.6, 4001):
        tried = share * peak
        if share:
            best = torch.minimum(best, (groups - tried * (groups / tried).round().clamp(-4, 3)).square().sum(1))
    assert (found <= 1.25 * best + 1e-12).all() and float(found.sum() / best.sum()) < 1.03


def test_the_scale_and_minimum_of_a_group_by_brute_force() -> None:
    groups = weights(10, 8)
    scale, minimum = affine(groups, torch.ones(8), 3, floor=False)
    found = (groups - minimum - scale * ((groups - minimum) / scale).round().clamp(0, 3)).square().sum(1)
    least, spread = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)
    best = torch.full((10,), torch.inf)
    for wide, up in itertools.product(np.linspace(0.1, 0.4, 61), np.linspace(-0.1, 0.3, 81)):
        step, low = wide * spread, least + up * spread
        best = torch.minimum(best, (groups - low - step * ((groups - low) / step).round().clamp(0, 3)).square().sum(1))
    assert float(found.sum() / best.sum()) < 1.15


@pytest.mark.parametrize("name", TYPES)
def test_columns_that_count_are_nearer(name: str) -> None:
    weight = weights(4)
    count = torch.where(torch.arange(512) % 4 == 0, 10.0, 0.1)
    if name == "Q8_0":  # no search: what counts changes nothing
        assert torch.equal(encode(weight, name, count), encode(weight, name))
    else:
        assert error(weight, name, count, count) < error(weight, name, None, count)
    assert torch.equal(encode(weight, name, torch.full((512,), 3.0)), encode(weight, name))


@pytest.mark.parametrize("name", TYPES)
def test_groups_at_the_limits(name: str) -> None:
    zeros = torch.zeros(2, 256)
    assert torch.equal(decoded(encode(zeros, name), name), zeros)
    for weight, most in [
        (torch.full((1, 256), 0.25), 0.02),
        (torch.full((1, 256), -0.25), 0.02),
        (torch.rand(1, 256, generator=torch.Generator().manual_seed(0)) + 1, 0.2),
        (torch.eye(1, 256) * 1000, 0.02),
        (torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * 1e-3, 0.4),
        (torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * 1e4, 0.4),
    ]:
        found = decoded(encode(weight, name), name)
        assert found.isfinite().all()
        assert float((found - weight).norm() / weight.norm()) < most, weight[0, :3]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
def test_a_row_does_not_depend_on_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(5).to(torch.bfloat16)
    whole = encode(weight, name)
    assert torch.equal(whole, encode(weight.float(), name))
    monkeypatch.setattr(ours, "AT_ONCE", 512)
    assert torch.equal(encode(weight, name), whole)
    assert torch.equal(encode(weight[2:3], name), whole[2:3])
