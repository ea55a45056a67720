"""The heatmap: a cell for each linear, of the colour its error has on a logarithmic scale."""

from collections.abc import Mapping
from html import unescape
from math import inf
from xml.etree import ElementTree

import pytest

from wtool.report.figures import linears, stacks
from wtool.report.heatmap import SPAN, STEPS, bounds, edges, heatmap, short_names, step


def drawn(report: Mapping[str, Mapping[str, object]], low: float = 0.01, high: float = 1.0) -> ElementTree.Element:
    (stack,), _ = stacks(linears({"report": report}))
    return ElementTree.fromstring(heatmap(stack, low, high))


def cells(picture: ElementTree.Element) -> dict[str, tuple[str, float, float]]:
    """The first line of each cell's tooltip, with its colour and place."""
    found: dict[str, tuple[str, float, float]] = {}
    for group in picture.iter("g"):
        title, box = group.find("title"), group.find("rect")
        assert title is not None and box is not None and title.text
        name = title.text.splitlines()[0]
        found[name] = (box.attrib["class"], float(box.attrib["x"]), float(box.attrib["y"]))
    return found


@pytest.mark.parametrize("low, high", [(0.01, 0.9), (0.05, 0.2)])
def test_colours_meet_at_equal_ratios(low: float, high: float) -> None:
    marks = edges(low, high)
    assert marks[0] == pytest.approx(low) and marks[-1] == pytest.approx(high) and len(marks) == STEPS + 1
    ratios = [b / a for a, b in zip(marks, marks[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * STEPS)
    for number in range(STEPS):
        assert step(marks[number] * 1.0001, low, high) == number == step(marks[number + 1] * 0.9999, low, high)
    assert step(low / 9, low, high) == step(0.0, low, high) == 0 and step(high * 9, low, high) == STEPS - 1


def test_the_scale_holds_every_error_and_is_never_narrow() -> None:
    def of(*errors: float | None) -> tuple[float, float] | None:
        return bounds(linears({"report": {str(n): {"weight_error": error} for n, error in enumerate(errors)}}))

    assert of(0.02, 0.5, None, 0.1, inf, 0.0) == pytest.approx((0.02, 0.5))
    assert of(0.1) == pytest.approx((0.1 / SPAN**0.5, 0.1 * SPAN**0.5))
    narrow = of(0.1, 0.11)
    assert narrow and narrow[1] / narrow[0] == pytest.approx(SPAN) and narrow[0] < 0.1 < 0.11 < narrow[1]
    assert of() is None and of(None, 0.0, inf) is None


def test_each_linear_has_its_cell() -> None:
    report = {
        f"model.layers.{block}.{place}": {"output_error": 0.011 + 0.1 * block + 0.3 * column}
        for block in range(3)
        for column, place in enumerate(("self_attn.q_proj", "mlp.down_proj"))
        if (block, column) != (1, 0)
    }
    found = cells(drawn(report))
    assert found.keys() == report.keys()
    for name, (colour, _, _) in found.items():
        error = report[name]["output_error"]
        assert colour == f"c{step(error, 0.01, 1.0)}"
    columns = {name.rpartition(".")[2]: {x for key, (_, x, _) in found.items() if key.endswith(name)} for name in found}
    assert all(len(places) == 1 for places in columns.values())
    rows = {block: {y for key, (_, _, y) in found.items() if f".{block}." in key} for block in range(3)}
    assert all(len(places) == 1 for places in rows.values()) and len(set.union(*rows.values())) == 3


def test_a_cell_of_experts_shows_the_worst() -> None:
    report = {f"h.0.experts.{number}.up": {"output_error": error} for number, error in enumerate([0.02, 0.9, 0.1])}
    (shown,) = cells(drawn(report)).items()
    assert shown[0] == "h.0.experts.1.up, the worst of 3" and shown[1][0] == f"c{STEPS - 1}"


def test_what_is_not_known_or_not_finite_is_no_colour() -> None:
    found = cells(drawn({"h.0.a": {"weight_error": inf}, "h.1.a": {}, "h.2.a": {"weight_error": 0.5}}))
    assert [found[f"h.{number}.a"][0] for number in range(3)] == ["bad", "none", f"c{step(0.5, 0.01, 1.0)}"]


def test_fallbacks_are_marked_and_told() -> None:
    picture = drawn({"h.0.a": {"output_error": 0.1, "fallback": "x < y & z"}, "h.1.a": {"output_error": 0.1}})
    assert len(list(picture.iter("circle"))) == 1
    titles = [title.text or "" for title in picture.iter("title")]
    assert any(text.endswith("rounded only: x < y & z") for text in titles)


def test_a_tooltip_tells_the_figures() -> None:
    told = {"output_error": 0.12345, "rtn_output_error": 0.2, "weight_error": 0.3, "bits": 4}
    texts = [title.text for title in drawn({"h.0.a": told}).iter("title")]
    assert "h.0.a\noutput error 0.1235 (by rounding 0.2000)\nweight error 0.3000\n4 bits" in texts


def test_names_of_places_are_short_and_unlike() -> None:
    assert short_names(["self_attn.q_proj", "mlp.up"]) == ["q_proj", "up"]
    places = ["mlp.up", "mlp.experts.*.up", "mlp.shared.up", "attn.up"]
    assert short_names(places) == ["mlp.up", "experts.up", "shared.up", "attn.up"]
    assert short_names(["a.up", "b.a.up"]) == ["a.up", "b.a.up"]
    assert short_names([""]) == [""]


def test_many_blocks_are_not_all_numbered_and_all_drawn() -> None:
    picture = drawn({f"h.{number}.a": {"weight_error": 0.1} for number in range(126)})
    numbers = [text.text for text in picture.iter("text") if text.attrib["class"] == "block"]
    assert numbers == [str(number) for number in range(0, 126, 5)]
    assert len(list(picture.iter("rect"))) == 126
    _, _, _, height = map(float, picture.attrib["viewBox"].split())
    assert all(y < height for _, _, y in cells(picture).values())


def test_hostile_names() -> None:
    name = 'h.0.<script>alert("x")</script>'
    assert name in {unescape(key) for key in cells(drawn({name: {"weight_error": 0.1}}))}
