"""The page as a reader sees it: in Chromium, light and dark, wide and on a phone."""

import json
from pathlib import Path

import pytest
from browser import View, measured, needs_chromium, photograph
from pictures import pixels

from wtool.report.html import comparison_html, report_html
from wtool.report.quality import Score
from wtool.report.style import DARK, LIGHT

PLACES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
MANIFEST = {
    "recipe": {"quantize": {"model": "org/" + "name" * 40, "method": "gptq", "bits": 4}},
    "inputs": [{"checkpoint": "org/name", "weights_xxh3": "b6f478ac5a56eabbf16edb4f4e736693"}],
    "summary": {"bytes_before": 1_000_000, "bytes_after": 250_000, "sizes": {"layers": [40, 30]}},
    "kept": {"layers": list(range(30))},
    "report": {
        f"model.layers.{n}.{place}": {"output_error": 0.01 * 1.1**n, "weight_error": 0.1, "rtn_output_error": 0.2 + i}
        for n in range(30)
        for i, place in enumerate(PLACES)
    },
    "evaluation": [{"tokens": 10 * n, "kl": 1.0 / (n + 1), "perplexity": 9.0} for n in range(4)],
}
PHONE = View(width=375, height=900)
pytestmark = needs_chromium


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    score = Score("q4", "a-long-name-of-a-text-file.txt", 12.5, 123_456, 1024, "org/name", 10.0, 0.1, 0.9)
    path.write_text(report_html(MANIFEST, name="q4-of-a-model-with-a-long-name", scores=[score]), encoding="utf-8")
    return path


def test_no_page_is_wider_than_a_phone(page: Path) -> None:
    scores = [Score("one", f"text{n}.txt", 1.0, 1, 1, "r", 1.0, 0.1, 0.5) for n in range(5)]
    several = page.with_name("several.html")
    several.write_text(comparison_html([("one", MANIFEST), ("two", MANIFEST)], scores=scores), encoding="utf-8")
    for each in (page, several):
        width = measured(each, PHONE, "page => page.documentElement.scrollWidth")
        assert json.loads(width) == PHONE.width


def test_text_stands_out_from_what_is_behind_it() -> None:
    for theme in (LIGHT, DARK):
        pairs = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("onbad", "bad")]
        for ink, ground in [*pairs, *((f"i{n}", f"c{n}") for n in range(9))]:
            assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)  # WCAG 2, level AA


def contrast(first: str, second: str) -> float:
    """By WCAG 2: (L1 + 0.05) / (L2 + 0.05), with L the relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_is_the_readers(page: Path, dark: bool, tmp_path: Path) -> None:
    picture = photograph(page, View(width=700, height=500, dark=dark), tmp_path / "page.png")
    _, _, colours = pixels(picture.read_bytes())
    theme, other = (DARK, LIGHT) if dark else (LIGHT, DARK)
    shown = {colour.hex() for colour in colours}
    assert {theme[key].removeprefix("#") for key in ("page", "card", "ink")} <= shown
    assert other["page"].removeprefix("#") not in shown
