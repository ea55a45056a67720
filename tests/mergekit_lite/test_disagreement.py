"""Disagreement: the definitions in loops, samples at the same places, nothing where nothing can be told."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_lite.disagreement import LEAST, RUN, RUNS, figures, kept, sample


def matrices(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], Tensor]:
    made = torch.Generator().manual_seed(rows)
    base, *models, merged = (torch.randn(rows, columns, generator=made).to(dtype) for _ in range(5))
    return base, [base + 0.1 * model for model in models], merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_what_is_defined(dtype: torch.dtype) -> None:
    base, models, merged = matrices(64, 64, dtype)
    merged[:20] = base[:20]
    models = [torch.cat([base[:10], model[10:]]) for model in models]
    moved = [(model.double() - base.double()).reshape(-1).tolist() for model in models]
    conflicts = sum(any(x > 0 for x in at) and any(x < 0 for x in at) for at in zip(*moved, strict=True))
    cosines = []
    for i in range(3):
        for j in range(i):
            dot = sum(x * y for x, y in zip(moved[i], moved[j], strict=True))
            cosines.append(dot / math.sqrt(sum(x * x for x in moved[i]) * sum(y * y for y in moved[j])))
    change = float((merged.double() - base.double()).norm() / base.double().norm())
    size = math.sqrt(sum(x * x for x in base.double().reshape(-1).tolist()))
    squares = [sum(x * x for x in vector) for vector in moved]
    before, after = base.reshape(-1).tolist(), merged.reshape(-1).tolist()
    touched = [after[i] != before[i] for i in range(4096) if any(vector[i] for vector in moved)]
    expected = {
        "conflict": conflicts / 4096,
        "cosine": sum(cosines) / 3,
        "moved": math.sqrt(sum(squares) / 3) / size,
        "change": change,
        "untouched": 1 - sum(touched) / len(touched),
    }
    assert figures(base, models, merged) == pytest.approx(expected, abs=1e-6)


def test_what_is_kept_by_definition() -> None:
    base, (model, *_), _ = matrices(64, 64)
    rounded = model.bfloat16()
    way = [
        (x - y, z - y)
        for x, y, z in zip(*(each.double().flatten().tolist() for each in (model, base, rounded)), strict=True)
    ]
    expected = sum(a * b for a, b in way) / sum(a * a for a, _ in way)
    assert kept(base, model, rounded) == pytest.approx(expected, abs=1e-6)
    assert kept(base, model, model) == 1 and kept(base, model, base) == 0 and kept(base, base, base) is None
    assert kept(base, model, 2 * base - model) == pytest.approx(-1, abs=1e-3)


def test_opposite_and_equal_models() -> None:
    base, (model, *_), _ = matrices(64, 64)
    opposite = 2 * base - model
    told = figures(base, [model, opposite], base)
    assert told.pop("moved") == pytest.approx(float((model - base).norm() / base.norm()), rel=1e-3)
    assert told == pytest.approx({"conflict": 1, "cosine": -1, "change": 0, "untouched": 1}, abs=1e-3)
    assert figures(base, [model, model], model)["conflict"] == 0


def test_of_large_matrices_a_sample_is_near_the_whole() -> None:
    base, models, merged = matrices(1000, 1001)
    whole = [(model - base).numpy() for model in models]
    conflict = np.mean(np.any([each > 0 for each in whole], 0) & np.any([each < 0 for each in whole], 0))
    told = figures(base, models, merged)
    assert told["conflict"] == pytest.approx(float(conflict), abs=0.02)  # five standard deviations
    assert told["change"] == pytest.approx(float((merged - base).norm() / base.norm()), rel=0.03)


@pytest.mark.parametrize("count", [RUNS * RUN, RUNS * RUN + 1, 999_983])
def test_a_sample_spans_the_matrix(count: int) -> None:
    places = sample(torch.arange(count, dtype=torch.float64))
    assert len(places) == RUNS * RUN == len(set(places))
    assert places[0] == 0 and count - RUNS < places[-1] + 1 <= count
    shifted = torch.arange(-3, count, dtype=torch.float64)[3:]  # a view that begins in the middle of its storage
    assert np.array_equal(sample(shifted), places)


def test_what_cannot_be_told_is_left_out() -> None:
    zeros, ones = torch.zeros(64, 64), torch.ones(64, 64)
    assert figures(zeros, [zeros, zeros], zeros) == {"conflict": 0.0}
    assert figures(ones, [zeros], zeros) == {"moved": 1.0, "change": 1.0, "untouched": 0.0}
    assert figures(ones[:1, : LEAST - 1], [ones[:1, : LEAST - 1]], ones[:1, : LEAST - 1]) == {}
    assert figures(torch.ones(LEAST), [torch.ones(LEAST)], torch.ones(LEAST)) == {}
    assert figures(ones, [ones * math.inf, ones], ones * math.nan) == {"conflict": 0.0, "untouched": 0.0}
