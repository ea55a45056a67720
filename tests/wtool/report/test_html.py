"""The page: what a manifest tells is on it, parsed again; nothing is loaded, and no name can break out."""

import json
from html.parser import HTMLParser
from statistics import median
from typing import Any

import pytest
import yaml

from wtool.report.html import comparison_html, report_html
from wtool.report.quality import Score

VOID = {"meta", "wbr"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """What stands on a page, and whether its elements are closed as they were opened."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # element, attribute, value
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}  # by element
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag != "wbr":
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif inside in self.texts:
            self.texts[inside][-1] += data

    def tables(self) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.rows}


@pytest.fixture
def manifest() -> dict[str, Any]:
    report = {
        f"model.layers.{block}.{place}": {
            "weight_error": 0.1 + 0.001 * block,
            "output_error": 0.02 + 0.01 * block + 0.001 * column,
            "rtn_output_error": 0.04 + 0.02 * block + 0.002 * column,
            "damping": 0.01,
            "tokens": 65536,
            "bits": 4,
            "group_size": 64,
        }
        for block in range(4)
        for column, place in enumerate(("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
    }
    report["model.layers.3.mlp.down_proj"] |= {"fallback": "too few tokens: 3 < 64", "bits": 8}
    return {
        "wtool": "0.1.0",
        "recipe": {
            "quantize": {"model": "org/name", "method": "gptq", "bits": 4, "group_size": 64, "ignore": ["lm_head"]},
            "calibration": {"samples": 128, "tokens": 262144, "sources": [{"file": "my.jsonl", "xxh3": "00ff"}]},
        },
        "inputs": [{"checkpoint": "org/name", "revision": "abc123", "weights_xxh3": "beef"}],
        "left": {"lm_head.weight": "ignored, as asked", **{f"norm{n}": "not a matrix" for n in range(40)}},
        "summary": {"bytes_before": 1_000_000, "bytes_after": 250_000, "bits_per_weight": 4.25},
        "report": report,
        "tensors_xxh3": {},
    }


def test_the_figures_of_every_linear(manifest: dict[str, Any]) -> None:
    page = Page(report_html(manifest, name="out"))
    rows = page.tables()
    for module, told in manifest["report"].items():
        expected = [f"{told[key]:.4f}" for key in ("output_error", "rtn_output_error", "weight_error")]
        assert rows[module] == [*expected, str(told["bits"]), "64", "0.01", "65,536"]
    assert "All 12 quantized layers" in page.texts["summary"]


def test_the_worst_ten_from_the_worst_on(manifest: dict[str, Any]) -> None:
    page = Page(report_html(manifest, name="out"))
    begin = next(
        number
        for number, row in enumerate(page.rows)
        if row == ["layer", "output error", "by rounding", "weight error"]
    )
    shown = [row[0] for row in page.rows[begin + 1 : begin + 11]]
    report = manifest["report"]
    assert shown == sorted(report, key=lambda module: -report[module]["output_error"])[:10]
    assert "The 10 worst layers" in page.texts["h2"]


def test_the_tiles(manifest: dict[str, Any]) -> None:
    page = Page(report_html(manifest, name="out"))
    middle = median(told["output_error"] for told in manifest["report"].values())
    assert page.texts["b"] == ["250.0 kB", "4.25 bits", "12", f"{middle:.4f}", "−50%", "1"]
    assert "of weights, 25% of the 1.0 MB before" in page.texts["span"]


def test_what_was_asked_and_of_what(manifest: dict[str, Any]) -> None:
    page = Page(report_html(manifest, name="out"))
    rows = page.tables()
    assert (rows["bits"], rows["ignore"], rows["method"]) == (["4"], ["lm_head"], ["gptq"])
    assert rows["input 1"] == ["org/name at abc123, weights xxh3 beef"]
    assert rows["text: tokens"] == ["262144"] and rows["text: sources"] == ["file my.jsonl, xxh3 00ff"]
    assert page.texts["h1"] == ["out"]
    assert "org/name, quantized by gptq to 4 bits, groups of 64" in page.texts["p"]


def test_the_recipe_makes_it_again(manifest: dict[str, Any]) -> None:
    recipe, command = Page(report_html(manifest, name="out")).texts["pre"]
    assert yaml.safe_load(recipe) == manifest["recipe"]["quantize"]
    assert command == "wtool quantize recipe.yml -o OUT"


def test_fallbacks_and_what_was_left(manifest: dict[str, Any]) -> None:
    page = Page(report_html(manifest, name="out"))
    assert "Fallbacks" in page.texts["h2"]
    assert ": too few tokens: 3 < 64" in page.texts["li"]
    assert {"1 tensor: ignored, as asked", "40 tensors: not a matrix"} < set(page.texts["summary"])
    assert "and 10 more" in page.texts["li"]


@pytest.mark.parametrize(
    "key", ["wtool", "recipe", "inputs", "left", "summary", "report", "tensors_xxh3", "calibration"]
)
@pytest.mark.parametrize("instead", ["absent", None, [], {}, "text"])
def test_any_part_may_lack_or_be_of_another_kind(manifest: dict[str, Any], key: str, instead: Any) -> None:
    manifest.pop(key, None)
    if instead != "absent":
        manifest[key] = instead
    assert Page(report_html(manifest, name="out")).texts["h1"] == ["out"]


def test_a_manifest_of_nothing_is_a_page() -> None:
    page = Page(report_html({}, name="out"))
    assert page.texts["h1"] == ["out"] and not page.rows and "svg" not in page.tags


def test_a_merge_has_a_page_too() -> None:
    recipe = {"merge": {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}}
    page = Page(report_html({"recipe": recipe, "inputs": [{"checkpoint": "a"}, {"checkpoint": "b"}]}, name="out"))
    assert "a, b, merged by linear" in page.texts["p"]
    assert page.texts["pre"][1] == "wtool merge recipe.yml -o OUT"


def test_rounding_alone_shows_the_weights(manifest: dict[str, Any]) -> None:
    for told in manifest["report"].values():
        told["output_error"] = told["rtn_output_error"] = told["damping"] = None
    page = Page(report_html(manifest, name="out"))
    assert "Weight error, block by block" in page.texts["h2"] and "output error" not in str(page.rows)
    assert page.tables()["model.layers.0.self_attn.q_proj"] == ["0.1000", "4", "64", "65,536"]


def test_linears_in_no_block() -> None:
    page = Page(report_html({"report": {"head": {"weight_error": 0.1}}}, name="out"))
    assert "svg" not in page.tags and "The worst layer" in page.texts["h2"]
    both = {"report": {"head": {"weight_error": 0.1}, "h.0.a": {"weight_error": 0.1}}}
    assert any("Not in a block: head." in text for text in Page(report_html(both, name="out")).texts["p"])


def test_a_page_loads_nothing(manifest: dict[str, Any]) -> None:
    text = report_html(manifest, name="out")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "onload"} & {attribute for _, attribute, _ in page.attributes}
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme:dark" in text and ("meta", "name", "viewport") in page.attributes


def test_hostile_names_are_text(manifest: dict[str, Any]) -> None:
    harmless = Page(report_html(manifest, name="out"))
    hostile = json.loads(json.dumps(manifest))
    report = hostile["report"]
    report[f"model.layers.0.{HOSTILE}"] = {"output_error": 0.1, "weight_error": 0.1, "fallback": HOSTILE}
    report[f"{HOSTILE}.0.a"] = {"output_error": 0.1}
    hostile["left"][HOSTILE] = HOSTILE
    hostile["wtool"] = HOSTILE
    hostile["recipe"]["quantize"] |= {"model": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}
    hostile["recipe"]["calibration"]["sources"] = [{"file": HOSTILE}]
    hostile["inputs"] = [{"checkpoint": HOSTILE, "revision": HOSTILE, "weights_xxh3": HOSTILE}]
    page = Page(report_html(hostile, name=HOSTILE))
    assert set(page.tags) - {"h3"} == set(harmless.tags)
    assert {attribute for _, attribute, _ in page.attributes} == {attribute for _, attribute, _ in harmless.attributes}
    assert page.texts["h1"] == [HOSTILE] and page.tables()["model"] == [HOSTILE]
    assert yaml.safe_load(page.texts["pre"][0]) == hostile["recipe"]["quantize"]
    assert any(HOSTILE in title for title in page.texts["title"])


def test_equal_manifests_give_equal_pages(manifest: dict[str, Any]) -> None:
    again = json.loads(json.dumps(manifest))
    assert report_html(manifest, name="out") == report_html(again, name="out")


SCORE = Score("out/q4", "a.txt", 12.5, 100, 64, "base", 10.0, 0.125, 0.75)


def test_quality_is_a_table(manifest: dict[str, Any]) -> None:
    page = Page(report_html(manifest, name="q4", scores=[SCORE, Score("base", "a.txt", 10.0, 100, 64)]))
    rows = page.tables()
    assert rows["checkpoint"][:4] == ["text", "perplexity", "reference's", "KL"]
    assert rows["out/q4"] == ["a.txt", "12.500", "10.000", "0.1250", "75.0%", "100", "64", "base"]
    assert rows["base"] == ["a.txt", "10.000", "–", "–", "–", "100", "64", "–"]


def test_several_are_compared_first(manifest: dict[str, Any]) -> None:
    bare = {"recipe": {"merge": {"merge_method": "linear"}}, "inputs": [{"checkpoint": "a"}]}
    page = Page(comparison_html([("q4", manifest), ("soup", bare)], scores=[SCORE]))
    assert page.texts["h2"][0] == "Side by side" and page.texts["h1"] == ["q4, soup", "q4", "soup"]
    head = [
        "checkpoint",
        "what",
        "weights",
        "of before",
        "output error",
        "weight error",
        "a.txt: perplexity",
        "a.txt: KL",
    ]
    middle = median(told["output_error"] for told in manifest["report"].values())
    assert page.rows[0] == head
    assert page.rows[1][2:5] == ["250.0 kB", "25%", f"{middle:.4f}"] and page.rows[1][6:] == ["12.500", "0.1250"]
    assert page.rows[2] == ["soup", "a, merged by linear", *["–"] * 6]
    assert Page(comparison_html([(HOSTILE, manifest), ("b", {})])).texts["h1"] == [f"{HOSTILE}, b", HOSTILE, "b"]


def test_what_a_pruning_kept() -> None:
    kept = {"layers": [0, 1, 3], "ffn": {}}
    manifest = {"recipe": {"prune": {}}, "kept": kept, "summary": {"sizes": {"layers": [4, 3], "kv_heads": [8, 6]}}}
    page = Page(report_html(manifest, name="out"))
    assert page.tables()["layers"] == ["4", "3", "75%"] and page.tables()["key-value heads"] == ["8", "6", "75%"]
    assert "Layers 2 went; the others were numbered anew." in page.texts["p"]
    assert [value for tag, key, value in page.attributes if (tag, key) == ("i", "class")] == ["stays"] * 2 + [
        "gone",
        "stays",
    ]


def test_conflicts_of_a_merge_are_drawn() -> None:
    report = {f"m.{n}.a": {"conflict": 0.1 * n, "cosine": -0.5, "change": 0.01} for n in range(3)}
    page = Page(report_html({"report": report, "recipe": {"merge": {}}}, name="out"))
    assert page.tags.count("svg") == 3 and "Where the models disagree" in page.texts["h2"]
    assert page.tables()["m.2.a"][:3] == ["0.2000", "−0.5000".replace("−", "-"), "0.0100"]
    assert "20.0%" not in page.texts["b"] and "10.0%" in page.texts["b"]
