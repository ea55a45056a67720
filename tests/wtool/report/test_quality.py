"""Scores are read from what `wtool eval --json` prints, and from nothing else."""

from typing import Any

import pytest

from wtool.errors import MalformedFile
from wtool.report.quality import Score, scores, table

TOLD = {
    "checkpoint": "x/q4",
    "reference": "base",
    "texts": [{"file": "t/a.txt", "perplexity": 2.0, "tokens": 9, "window": 8}],
}


def test_what_is_told() -> None:
    (found,) = scores(TOLD, "e.json")
    assert found == Score("x/q4", "a.txt", 2.0, 9, 8, "base", None, None, None)
    assert found.is_of("q4") and not found.is_of("x")


@pytest.mark.parametrize(
    "told", [[], {}, {"texts": []}, {"checkpoint": "a", "texts": [{"file": "b"}]}, {**TOLD, "texts": [3]}]
)
def test_other_files_are_refused(told: Any) -> None:
    with pytest.raises(MalformedFile, match=r"^e\.json: .*give what wtool eval --json printed$"):
        scores(told, "e.json")


def test_unknown_columns_are_left_out() -> None:
    html = table(scores({**TOLD, "reference": None}, "e.json"))
    assert "KL</th>" not in html and "perplexity</th>" in html and table([]) == ""
