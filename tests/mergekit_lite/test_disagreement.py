"""Disagreement: the definitions in loops, samples at the same places, nothing where nothing can be told."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_lite.disagreement import LEAST, ONE_OF, RUN, RUNS, Watch, is_told, sample
from mergekit_lite.disagreement import figures as figures_of
from mergekit_lite.methods.table import METHODS
from wtool import pieces
from wtool.pieces import pieces_of
from wtool.rounding import at_random, stochastic


def matrices(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor], Tensor]:
    made = torch.Generator().manual_seed(rows)
    base, *models, merged = (torch.randn(rows, columns, generator=made).to(dtype) for _ in range(5))
    return base, [base + 0.1 * model for model in models], merged


def figures(base: Tensor, models: list[Tensor], merged: Tensor, dtype: torch.dtype | None = None) -> dict[str, float]:
    made = pieces_of(merged, dtype)
    watch = Watch(made, made, torch.float32)
    watch.pieces().whole()
    return figures_of(base, models, watch)


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
    told = figures(base, models, merged)
    assert told.pop("kept", 1.0) == 1.0
    assert told == pytest.approx(expected, abs=1e-6)


def test_what_is_kept_by_definition() -> None:
    base, (model, *_), _ = matrices(64, 64)
    way = [
        (x - y, z - y)
        for x, y, z in zip(*(each.double().flatten().tolist() for each in (model, base, model.bfloat16())), strict=True)
    ]
    expected = sum(a * b for a, b in way) / sum(a * a for a, _ in way)
    assert figures(base, [model], model, torch.bfloat16)["kept"] == pytest.approx(expected, abs=1e-6)
    held = base.bfloat16().float()
    assert figures(held, [model], model.bfloat16().float(), torch.bfloat16)["kept"] == 1
    near = torch.nextafter(held, torch.full_like(held, torch.inf))
    assert figures(held, [near], near, torch.bfloat16)["kept"] == 0
    assert "kept" not in figures(base, [model], model), "nothing is rounded"
    assert "kept" not in figures(held, [model], held, torch.bfloat16), "there is no way to go"


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
    assert is_told(ones) and not is_told(ones.view(1, -1)[:, : LEAST - 1]) and not is_told(torch.ones(LEAST))
    assert figures(ones, [ones * math.inf, ones], ones * math.nan) == {"conflict": 0.0, "untouched": 0.0}


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, False), *((dtype, how) for dtype in (torch.bfloat16, torch.float16) for how in (False, True))],
)
@pytest.mark.parametrize(
    ("count", "size"),
    [(100, 1), *((count, size) for count in (100, RUNS * RUN, RUNS * RUN + 1, 300_007) for size in (700, 1 << 18))],
)
def test_watching_takes_the_sample_and_changes_no_byte(
    count: int, size: int, dtype: torch.dtype, rounding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", size)
    exact = torch.randn(count, generator=torch.Generator().manual_seed(0))
    plain = pieces_of(exact, dtype)
    watch = Watch(at_random(plain, dtype, 3) if rounding else plain, plain, torch.float32)
    made = watch.pieces().whole()
    assert torch.equal(made, stochastic(exact, dtype, 3) if rounding else exact.to(dtype))
    assert np.array_equal(watch.result, sample(made))
    assert all(np.array_equal(part, sample(exact)[places]) for places, part in watch.exact)
    looked_at = sum(part.size for _, part in watch.exact)
    assert looked_at == (dtype != torch.float32) * (count if count <= RUNS * RUN else RUNS * RUN // ONE_OF)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.has_base])
def test_watching_a_method_changes_no_byte(name: str, rounding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 5000)
    method = METHODS[name]
    base, models, _ = matrices(130, 140)
    tensors = [tensor.bfloat16() for tensor in (base, *models[: method.most or 2])]
    given: dict[str, Any] = {"t": 0.02} if name == "nearswap" else {}
    given |= {key: [0.5] * 2 if key != "epsilon" else [0.1] * 2 for key in method.per_model}
    given |= {"key": [1, 2]} if method.is_random else {}
    made = method.function.pieces(tensors[0], tensors[1:], dtype=torch.bfloat16, **given)
    watch = Watch(at_random(made, torch.bfloat16, 3) if rounding else made, made, torch.float32)
    exact = method.function(tensors[0], tensors[1:], dtype=torch.float32, **given)
    written = watch.pieces().whole()
    assert torch.equal(written, stochastic(exact, torch.bfloat16, 3) if rounding else exact.bfloat16())
    assert np.array_equal(watch.result, sample(written)) and watch.exact
    assert all(np.array_equal(part, sample(exact)[places]) for places, part in watch.exact)
