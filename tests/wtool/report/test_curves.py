"""The curves of a training: every point of the manifest is where it belongs, and nothing else is drawn."""

import math
import re

import pytest

from wtool.report import curves
from wtool.report.html import report_html

EVALUATION = [
    {"step": 0, "tokens": 0, "kl": 2.0, "perplexity": 90.0},
    {"step": 5, "tokens": 500, "kl": 0.5, "perplexity": 30.0},
    {"step": 10, "tokens": 1000, "kl": 1.0, "perplexity": 40.0},
]
MANIFEST = {"recipe": {"distill": {"teacher": "t"}}, "evaluation": EVALUATION, "best_step": 5}


def drawn(html: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline class="line" points="([^"]*)"', html)
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in lines]


def test_points_are_in_proportion() -> None:
    kl, perplexity = drawn(curves.pictures(MANIFEST))
    (x0, y0), (x1, y1), (x2, y2) = kl
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # 500 tokens each
    assert y1 > y2 > y0  # a smaller number is drawn lower
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1.5 / 1.0, rel=0.02)
    assert len(perplexity) == 3


def test_the_best_is_marked_and_told() -> None:
    html = curves.pictures(MANIFEST)
    (x, y), *more = re.findall(r'<circle class="mark" cx="([\d.]+)" cy="([\d.]+)"', html)
    assert (float(x), float(y)) == pytest.approx(drawn(html)[0][1], abs=0.1)
    assert len(more) == 1  # of the perplexity
    assert curves.tiles(MANIFEST)[0][0] == "2 → 0.5"
    assert curves.tiles(MANIFEST)[-1] == ("1,000", "tokens learnt from")


def test_what_is_no_number_is_left_out() -> None:
    bad = [*EVALUATION, {"step": 15, "tokens": 1500, "kl": math.inf}, {"step": 20, "tokens": None, "kl": 1.0}, "no"]
    assert [len(line) for line in drawn(curves.pictures({"evaluation": bad}))] == [3, 3]


@pytest.mark.parametrize("manifest", [{}, {"evaluation": EVALUATION[:1]}, {"training": 3, "evaluation": None}])
def test_without_a_training_nothing_is_drawn(manifest: dict[str, object]) -> None:
    assert curves.pictures(manifest) == "" and curves.tiles(manifest) == []


@pytest.mark.parametrize("values", [(1.0, 1.0), (1e-9, 2e-9), (10000.1, 10000.2), (0.0, 1e12), (-1.0, 1.0)])
def test_axes_have_few_numbers_that_differ(values: tuple[float, float]) -> None:
    told = [{"tokens": i * 7.0, "kl": value} for i, value in enumerate(values)]
    labels = re.findall(r'<text class="block"[^>]*>([^<]*)<', curves.pictures({"evaluation": told}))
    assert 1 <= len(labels) <= 6 and len(set(labels)) == len(labels)


def test_the_page_has_them() -> None:
    html = report_html(MANIFEST, name="out")
    assert "The training" in html and "distilled" in html
